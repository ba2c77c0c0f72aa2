"""What methods that only choose real images have in common: everything but the rule."""

from abc import abstractmethod
from dataclasses import dataclass

from dsdistill.data import ImageSource
from dsdistill.engine import Job, PerClass, Run, State
from dsdistill.selection.choice import Rule, Selector, choose
from dsdistill.selection.features import Extractor


@dataclass(frozen=True, kw_only=True)
class Selection(PerClass):
    """Real images of each class, chosen by a rule on their features; nothing is learned but the features."""

    extractor: Extractor = Extractor()
    """Network whose features the images are chosen by, and how it is trained."""

    @property
    @abstractmethod
    def rule(self) -> Rule | Selector:
        """Which images of a class are taken."""

    def check(self, source: ImageSource) -> None:
        """Refuse what `PerClass.check` refuses, and an extractor that does not fit the images.

        Raises:
            BadData, InvalidSetting: as there.
        """
        super().check(source)
        self.extractor.check(source)

    def start(self, run: Run, job: Job) -> State:
        count = self.form.images_per_class(self.ipc)
        return State(*self.made_of(run, choose(run, self.rule, self.extractor, count)))
