"""The context of a run's stages: its recipe, its directory, and models that load when first needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.recipe.load import Recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import Console, QuietConsole
from limbeck.runtime.heartbeat import LastWord, wait_until
from limbeck.runtime.interrupts import GracefulStop
from limbeck.runtime.launcher import Launch, launched
from limbeck.runtime.records import fingerprint
from limbeck.runtime.rundir import RunDirectory
from limbeck.runtime.shared_work import OneProcess, Work
from limbeck.types import Json, Prompt

if TYPE_CHECKING:
    import torch

    from limbeck.models.vocabulary import VocabularyCard
    from limbeck.pipeline.plan.sizes import StudentSize
    from limbeck.pipeline.seen_prompts import SeenPrompts
    from limbeck.recipe.teacher import TeacherSection
    from limbeck.runtime.shared_work import Job
    from limbeck.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the steps of a run, from files to files.

    Attributes:
        check: refuses what can be known to fail before the first stage begins; it loads no models and writes nothing.
        inputs: what the stage reads of the recipe and of other files, JSON-able; with the stages before it makes the
            fingerprint.
        run: does the work and returns what its manifest records beside time and memory.
        outputs: the files it writes. They move aside when the stage is superseded, and are shared with runs that have
            the same inputs.
        shared: whether another run with the same inputs would write the same.
        working: patterns of outputs that only the stage itself reads, to go on where it was stopped; they may be gone
            once it is done, and so may all outputs of an `intermediate` stage once those that read them are done.
        handed_on: patterns of those working files that the next stage reads.
        helped: what the other ranks of a launch do of it, by the kind of the job that the first one posts.
        cheap: done again without `update` where the files that it reads were made again and differ.
        hands_on_teacher: keeps the teacher's weights in memory for the next stage.
        included: whether a recipe has the stage at all.
    """

    name: str
    inputs: Callable[[RunContext], Json]
    run: Callable[[RunContext], Json]
    outputs: Callable[[RunDirectory], tuple[Path, ...]]
    check: Callable[[RunContext], None] = lambda context: None
    shared: bool = True
    working: tuple[str, ...] = ()
    handed_on: tuple[str, ...] = ()
    intermediate: bool = False
    cheap: bool = False
    hands_on_teacher: bool = False
    helped: Mapping[str, Callable[[RunContext, Job], None]] = field(default_factory=dict)
    included: Callable[[Recipe], bool] = lambda recipe: True


@dataclass
class RunContext:
    """One run of a recipe. Models are loaded when a stage first needs them.

    Attributes:
        artifacts: results that runs with the same inputs share; None where the run shares nothing.
        pause_at: share of the optimizer steps after which training pauses with a checkpoint.
        wanted: names of the stages to run; None for all.
        work: where the other ranks of a launch find what they may do.
        kept: what a rank keeps in memory from one of the jobs of a stage to the next.
    """

    recipe: Recipe
    console: Console = field(default_factory=QuietConsole)
    stop: GracefulStop = field(default_factory=GracefulStop)
    artifacts: ArtifactCache | None = None
    pause_at: float | None = None
    wanted: frozenset[str] | None = None
    work: Work = field(default_factory=OneProcess)
    kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.recipe.directory)

    @cached_property
    def launch(self) -> Launch:
        """Description of how this process was started.

        Raises:
            LimbeckError: in a way that limbeck cannot train with.
        """
        return launched().with_sharding(self.recipe.train.sharding)

    @property
    def rank(self) -> int:
        """This process's number under a launcher; the first, 0, does what its stages do not share with the others."""
        return int(os.environ.get("RANK", "0"))

    def wants(self, stage: str) -> bool:
        """Whether a stage is among those that are to be done."""
        return self.wanted is None or stage in self.wanted

    @property
    def signs(self) -> dict[int, Path]:
        """The files that the other ranks touch while they are alive; that of the first one is the lock."""
        others = (rank for rank in range(self.launch.ranks) if rank != self.rank)
        return {rank: self.run.sign_of(rank) if rank else self.run.lock for rank in others}

    @cached_property
    def device(self) -> torch.device:
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of the run, one for all stages; its weights load when a stage first needs them."""
        if self.recipe.teacher.across is not None and self.recipe.combine is None:
            from limbeck.pipeline.across import across_teacher

            return across_teacher(self, self.run_teacher)
        return self.run_teacher if self.seen is None else self.seen.teacher(self.run_teacher)

    @cached_property
    def run_teacher(self) -> Teacher:
        """The same, reading the student's prompts."""
        if self.recipe.combine is None or not self.recipe.teachers:
            return self._opened(self.recipe.teacher, "")
        from limbeck.pipeline.several import several_teachers

        return several_teachers(self, self.run_teachers)

    @cached_property
    def run_teachers(self) -> Mapping[str, Teacher]:
        """Each of several teachers by name, reading the student's prompts."""
        return {name: self._opened(section, name) for name, section in self.recipe.teachers.items()}

    @cached_property
    def student_size(self) -> StudentSize:
        """The size of its student, known without weights."""
        from limbeck.pipeline.plan.case import student_size

        return student_size(self)

    def member_of(self, prompt_id: str) -> str:
        """Name of the teacher of a prompt, where there are several."""
        routing = self.recipe.routing
        assert routing is not None, "asked for where each prompt has one of several"
        return routing.member_of(self.known_prompts[prompt_id], tuple(self.recipe.teachers))

    @cached_property
    def known_prompts(self) -> dict[str, Prompt]:
        """The prompts of the run by id, and those that an evaluation adds, such as problems."""
        from limbeck.prompts.io import StoredPrompts

        return {prompt.id: prompt for prompt in StoredPrompts(self.run.prompts)}

    def _opened(self, section: TeacherSection, name: str) -> Teacher:
        """A teacher of a section; its weights load when they are first needed."""
        from limbeck.teachers.base import TeacherModel

        named, section = section.model, self.recipe.source_of(section)
        model = TeacherModel(
            model=section.model,
            name=named,
            revision=section.revision,
            dtype=section.dtype,
            bits=section.bits,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
        teacher = section.where.open(model, device=self.device, progress=self.console.say)
        teacher.images, teacher.asked = self.run.images, self.run.asked
        teacher.support, teacher.support_k = section.support, section.support_k
        teacher.student_k = section.student_k
        teacher.paid = self.run.paid(name)
        return teacher

    @cached_property
    def seen(self) -> SeenPrompts | None:
        """The prompts as the teacher sees them; None where it sees the student's."""
        from limbeck.pipeline.seen_prompts import SeenPrompts
        from limbeck.teachers.sees import StudentsPrompt

        views = [section.sees for section in self.recipe.every_teacher.values()]
        return None if all(isinstance(view, StudentsPrompt) for view in views) else SeenPrompts(self)

    @cached_property
    def teacher_card(self) -> VocabularyCard:
        """The teacher's vocabulary, chat template and context length, read without its weights."""
        return self.teacher.vocabulary

    @cached_property
    def student_card(self) -> VocabularyCard | None:
        """The same of the model that the student starts from; None where that is the teacher."""
        from limbeck.models.vocabulary import describe_vocabulary

        section = self.recipe.student
        if section.model is None:
            return None
        return describe_vocabulary(
            section.model, revision=section.revision, trust_remote_code=section.trust_remote_code
        )

    @property
    def reads_images(self) -> bool:
        """Whether both models read images."""
        cards = [self.teacher_card, *([self.student_card] if self.student_card else [])]
        return all(card.image_token is not None for card in cards)

    @property
    def student_trusted(self) -> bool:
        """Whether Python files in the folder of the model that the student starts from may run."""
        section = self.recipe.student if self.recipe.student.model is not None else self.recipe.teacher
        return section.trust_remote_code

    @property
    def window(self) -> int | None:
        """The most tokens of prompt and response together that both models can read; None where neither has a limit."""
        student = self.student_card.context_length if self.student_card else self.teacher_card.context_length
        student = self.recipe.student.config.get("max_position_embeddings", student)
        limits = [limit for limit in (self.teacher_card.context_length, student) if limit is not None]
        return min(limits, default=None)

    @cached_property
    def teacher_fingerprint(self) -> str:
        return self.teacher.fingerprint

    @cached_property
    def last_word(self) -> LastWord:
        """The error that the first rank ends with, as another one sees it."""
        return LastWord(self.run.last_word)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait, on a rank other than the first, for files that the first rank writes, while its process is alive.

        Raises:
            LimbeckError: the first rank has ended, or writes to another folder than this rank reads.
        """
        wait_until(ready, sign=self.run.lock, word=self.last_word, rank=self.rank)

    def fingerprints(self, stages: Sequence[Stage]) -> dict[str, str]:
        """The fingerprint of every stage of the recipe: its own inputs and, through the chain, those of all before."""
        prints: dict[str, str] = {}
        before = ""
        for stage in (stage for stage in stages if stage.included(self.recipe)):
            before = prints[stage.name] = fingerprint(
                {"stage": stage.name, "inputs": stage.inputs(self), "after": before}
            )
        return prints
