"""The evaluation of a run, as an `EvaluationContext`: one student and one teacher on held-out prompts.

The same for all evaluation groups: answers are written batch by batch so that none is written twice, rows and details
are kept on disk. See `limbeck.pipeline.evaluation_models` for which model is in memory when.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.evaluation.context import Part, Who, response_text
from limbeck.evaluation.group import EvaluationGroup, GroupInPieces
from limbeck.evaluation.pieces import Piece
from limbeck.evaluation.tasks.problems import Problem, TaskName
from limbeck.models.quantization.files import QuantizedWeights, read_blocks
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.evaluation_models import EvaluatedModels
from limbeck.pipeline.image_prompts import expanded_lengths
from limbeck.pipeline.measuring_by_ranks import joined_pieces, write_pieces
from limbeck.pipeline.problems import read_prompt_problems
from limbeck.pipeline.resumable import write_in_batches
from limbeck.pipeline.sampled_responses import ASKED, posted_prompts, sampler_for, sampling_meter
from limbeck.pipeline.seen_prompts import as_seen
from limbeck.pipeline.several import writers
from limbeck.pipeline.sharing import once
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.lengths import check_lengths
from limbeck.prompts.templates import LossOn, encode_prompts, encode_responses
from limbeck.recipe.evaluation import EvaluateSection
from limbeck.recipe.responses import CACHE_GIB
from limbeck.rollouts.asked import open_asked
from limbeck.rollouts.io import read_responses, write_responses
from limbeck.runtime.console import Console
from limbeck.runtime.interrupts import GracefulStop
from limbeck.runtime.records import fingerprint
from limbeck.runtime.shared_work import Job, Share
from limbeck.sampling.local import LocalSampler
from limbeck.types import AFTER_TRAINING, Json, LimbeckError, Prompt, Response, Sampling, SignalSource, TokenPrompt

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class RunEvaluation(EvaluatedModels):
    """One student on the held-out prompts of a run. Models load on first use."""

    @property
    def settings(self) -> EvaluateSection:
        return self.context.recipe.evaluate

    @property
    def folder(self) -> Path:
        """Folder of a group's caches, and of the rows and details of all groups."""
        return self.context.run.scores

    @property
    def root(self) -> Path:
        return self.context.run.root

    @property
    def console(self) -> Console:
        return self.context.console

    @property
    def stop(self) -> GracefulStop:
        return self.context.stop

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def standalone(self) -> bool:
        """Whether two models are evaluated on their own, without the responses of a run."""
        return self.context.run.manifest("respond") is None

    @property
    def evaluated(self) -> bool:
        return self.context.run.done("evaluate")

    @property
    def has_teacher(self) -> bool:
        return "writing" in self.context.teacher.provides

    @property
    def window(self) -> int | None:
        return self.context.window

    @property
    def loss_on(self) -> LossOn:
        return self.context.recipe.prompts.loss_on

    @property
    def responses_author(self) -> Literal["teacher", "data"]:
        return self.context.recipe.base_author

    @property
    def reads_documents(self) -> bool:
        return self.context.recipe.documents

    @property
    def task(self) -> TaskName | None:
        return self.context.recipe.prompts.problems_of

    @property
    def key_names(self) -> tuple[str, ...]:
        """Environment variables of API keys that must not appear in any file."""
        responses = self.context.recipe.responses
        named = (getattr(one, "api_key_env", None) for one in (responses.server, responses.engine))
        return tuple(name for name in named if name)

    @property
    def scoring_batch_size(self) -> int:
        return SCORING_BATCH_SIZE

    def before(self) -> RunEvaluation:
        """The same evaluation of the student before training."""
        return replace(self, part="before")

    def distilled(self) -> RunEvaluation:
        """The same with the student as distillation left it, before preference tuning."""
        return replace(self, part="distilled")

    def require_preferred(self, key: str) -> None:
        if self.context.recipe.preference is None:
            raise LimbeckError(
                f"{key} is distilled, the student before preference tuning, but the recipe has no section preference; "
                f"add it, or set {key}=teacher"
            )

    def encode(self, who: Who, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[TokenPrompt]:
        """Token ids of prompts for the student or the teacher, which may see another prompt.

        Raises:
            LimbeckError: one does not fit its window.
        """
        tokenizer, section = self.tokenizer(who), self.context.recipe.prompts
        encoded = encode_prompts(
            prompts,
            tokenizer,
            self.template(who),
            control_tokens=section.control_tokens,
            chat_options=text_options(self.context, tokenizer),
        )
        encoded = [replace(prompt, split="heldout") for prompt in encoded]
        if who == "teacher" and (self.context.seen is not None or self.context.recipe.combine is not None):
            # Which teacher it has, and what that sees, are asked by its id.
            for prompt in prompts:
                self.context.known_prompts.setdefault(prompt.id, prompt)
            encoded = list(as_seen(self.context, encoded))
        fitting = check_lengths(
            encoded,
            window=self.window_of(who),
            max_new_tokens=max_new_tokens,
            too_long=section.too_long,
            # The limit is for the prompts of the data, not for what the teacher sees beside them.
            longest=None if who == "teacher" and self.context.seen is not None else section.max_prompt_length,
            lengths=expanded_lengths(self.context, encoded),
        )
        return list(fitting.kept)

    def encode_references(self, who: Who, prompts: Sequence[Prompt]) -> list[Response]:
        """Reference answers of the data, as responses in the tokens of the student or the teacher."""
        tokenizer, section = self.tokenizer(who), self.context.recipe.prompts
        return encode_responses(
            prompts,
            tokenizer,
            self.template(who),
            max_new_tokens=self.settings.max_new_tokens,
            control_tokens=section.control_tokens,
            chat_options=text_options(self.context, tokenizer),
            loss_on=section.loss_on,
        )

    def problems(self) -> list[Problem]:
        """The held-out prompts as problems."""
        if self.task is None:
            return []
        found = read_prompt_problems(self.context.run.problems)
        return [found[prompt.id] for prompt in self.prompts]

    def heldout_responses(self) -> Mapping[int, Response]:
        """The held-out responses of the run, by row of the signal."""
        return load_responses(self.context, "heldout")

    def training_responses(self) -> Sequence[Response]:
        """The responses that were there before training, but for the held-out ones."""
        return load_responses(self.context, "train").responses

    def quantized_weights(self) -> QuantizedWeights | None:
        """The blocks that the student was trained as; None where it is not quantised."""
        return read_blocks(self.context.run.student)

    def scoring_teacher(self, *, stored: bool, alone: bool = False) -> SignalSource:
        """The source of teacher signals: for responses of the run, which may be stored, or for any responses.

        Args:
            alone: let go of the student where the teacher itself is asked.
        """
        source = open_teacher(self.context) if stored else self.context.teacher
        if source is not self.context.teacher:
            # What is on disk takes none of its weights.
            self.release_teacher()
        elif alone:
            self.release_student()
        return source

    def sampler(self, who: Who, batch_size: int) -> LocalSampler:
        """Sampler of the student or the teacher; answers end where its template ends them."""
        speaker = self.speaker(who)
        return sampler_for(self.context, speaker.model, speaker.tokenizer, speaker.template, who, batch_size)

    def write_ahead(self, groups: Iterable[EvaluationGroup]) -> None:
        """Write the answers that groups will ask for, those of the teacher first.

        One model is in memory at a time while answers are written. Group by group the two would be loaded in turns; so
        each is loaded once for all of its answers. The teacher comes first: a student that is cut out of it is built of
        the weights that are still there, and it is the student that is measured afterwards.
        """
        # pyright takes no cached_property for what a protocol has as a property.
        asked = [one for group in groups for one in group.asks(self)]  # type: ignore[arg-type]
        # A group that asks of no prompts says itself what it lacks.
        asked = [one for one in asked if one.prompts is None or one.prompts]
        for who in ("teacher", "student"):
            for one in (one for one in asked if one.who == who):
                self.answers(who, one.sampling, one.prompts, keep_logp=one.keep_logp)

    def answers(
        self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None, *, keep_logp: bool = False
    ) -> list[Response]:
        """Answers to prompts (all held-out ones by default); each set is sampled once and kept on disk.

        Args:
            keep_logp: with the log-probability of each id at temperature 1.
        """
        prompts = self.prompts[: self.settings.prompts] if prompts is None else prompts
        asked_of = [(p.id, p.text, [m.as_turn() for m in p.messages or ()]) for p in prompts]
        key = fingerprint([asked_of, asdict(sampling), *(["logp"] if keep_logp else [])])[:12]
        writer = who if who == "teacher" else self.part
        path = self.folder / "answers" / f"{writer}-{key}.jsonl"
        if not path.exists() and who == "teacher":
            # The same for all students of a sweep.
            made_from: Json = {"answers": key, "batch_size": self.settings.batch_size}
            if (cache_gib := self.context.recipe.responses.cache_gib) != CACHE_GIB:
                made_from["cache_gib"] = cache_gib
            with once(self.context, made_from, path.parent, (path.name,)):
                if not path.exists():
                    self._answer(path, who, sampling, prompts, keep_logp)
        elif not path.exists():
            self._answer(path, who, sampling, prompts, keep_logp)
        return read_responses(path)

    def _answer(self, path: Path, who: Who, sampling: Sampling, prompts: Sequence[Prompt], keep_logp: bool) -> None:
        """Write the answers of the student or the teacher into a file."""
        asked = self.encode(who, prompts, max_new_tokens=sampling.max_new_tokens)
        found: dict[int, Response] = {}
        for folder, places in self._writers(who, asked).items():
            own = [asked[place] for place in places]
            fields: Json = {"part": self.part, "who": who, "folder": folder, "sampling": asdict(sampling)}
            fields |= {"keep_logp": keep_logp, "path": path.stem}
            teacher = None if who == "student" else self.context.run_teachers.get(folder, self.context.teacher)
            with posted_prompts(self.context, teacher, "answer", fields, own) as share:
                written = self.write_answers(share, fields, own)
            found |= dict(zip(places, written, strict=True))
        # The student before training has round 0, like all that was written before training.
        before = who == "student" and self.part == "before"
        answers = [found[place] for place in range(len(asked))]
        write_responses(path, answers if before else [replace(r, round=AFTER_TRAINING) for r in answers])
        shutil.rmtree(path.with_suffix(""))

    def write_answers(self, share: Share, fields: Json, asked: Sequence[TokenPrompt]) -> Sequence[Response]:
        """This rank's share of some answers, batch by batch; those of all on the first rank.

        Args:
            fields: of the job: who answers, how, and where.
        """
        who, folder, name = fields["who"], fields["folder"], fields["path"]
        writer, rows = self.writer(who, folder), self.settings.batch_size
        sampler = sampler_for(self.context, writer.model, writer.tokenizer, writer.template, who, rows)
        written, _ = write_in_batches(
            replace(sampler, keep_logp=fields["keep_logp"]),
            asked,
            Sampling(**fields["sampling"] | {"stop": tuple(fields["sampling"]["stop"])}),
            self.folder / "answers" / name / folder,
            stop=self.context.stop,
            watching=lambda done: sampling_meter(self.context, f"answer {name.partition('-')[0]}", len(asked), done),
            share=share,
        )
        if folder:
            # One of several is in memory at a time.
            self.context.run_teachers[folder].release()
        return written

    def _writers(self, who: Who, asked: Sequence[TokenPrompt]) -> dict[str, Sequence[int]]:
        """The places of prompts by the folder of the model that answers them; empty where one answers all."""
        if who == "student" or self.context.recipe.combine is None:
            return {"": range(len(asked))}
        return {writer.folder: writer.places for writer in writers(self.context, asked)}

    def domain_of(self, prompt_id: str) -> str | None:
        """Name of the teacher of a prompt, where each prompt has one of several."""
        return None if self.context.recipe.routing is None else self.context.member_of(prompt_id)

    def texts(self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None) -> dict[str, str]:
        """Texts of `answers` without special tokens, by prompt id."""
        answers, tokenizer = self.answers(who, sampling, prompts), self.tokenizer(who)
        return {r.prompt_id: response_text(r, tokenizer) for r in answers}

    def pieces(self, group: GroupInPieces, of: str, count: int) -> Iterator[Piece]:
        """The first `count` of a group's pieces, in order; the ranks of a launch share them."""
        # A teacher that is elsewhere is asked by one process.
        teacher = self.context.teacher
        here = "teacher" not in group.needs() or "weights" in teacher.provides or teacher.in_step
        if self.context.launch.ranks == 1 or not here:
            # pyright takes no cached_property for what a protocol has as a property.
            yield from group.pieces(self, of, range(count))  # type: ignore[arg-type]
            return
        name = next(name for name, one in self.settings.groups.items() if one is group)
        fields: Json = {"part": self.part, "group": name, "of": of, "count": count}
        with self.context.work.posted("measure", fields) as share:
            folder = self.pieces_folder(name, of)
            attend = partial(self.attend, group)
            yield from joined_pieces(self, group, of, count, folder, share, attend=attend)  # type: ignore[arg-type]

    def attend(self, group: EvaluationGroup) -> None:
        """Take part in the passes that other ranks need for a group, of a teacher that all pass through together."""
        fresh = group.scores_fresh or not self.context.recipe.teacher.cache
        if "teacher" in group.needs() and fresh:
            self.context.teacher.attend()

    def pieces_folder(self, group: str, of: str) -> Path:
        """Folder of what ranks have found for a group."""
        return self.folder / "pieces" / f"{self.part}.{group}.{of}"

    def meter(self, label: str, total: int, unit: str) -> Any:
        """Progress bar on the console (a context manager with `advance`)."""
        return self.context.console.meter(f"{label} {self.part}", total, unit)


def help_answer(context: RunContext, job: Job) -> None:
    """Another rank's share of answers of the student or the teacher."""
    asked = open_asked(job.folder / ASKED)
    evaluation_of(context, job.fields["part"]).write_answers(job, job.fields, asked)


def help_measure(context: RunContext, job: Job) -> None:
    """Another rank's share of the pieces of a group."""
    fields, evaluation = job.fields, evaluation_of(context, job.fields["part"])
    folder = evaluation.pieces_folder(fields["group"], fields["of"])
    group = evaluation.settings.groups[fields["group"]]
    assert isinstance(group, GroupInPieces), "no other group asks for pieces"
    # pyright takes no cached_property for what a protocol has as a property.
    of, count, attend = fields["of"], fields["count"], partial(evaluation.attend, group)
    write_pieces(evaluation, group, of, count, folder, job, attend=attend)  # type: ignore[arg-type]


def evaluation_of(context: RunContext, part: Part) -> RunEvaluation:
    """The evaluation of a part on another rank, which keeps its student from one job to the next."""
    kept = context.kept.get("evaluation")
    if not isinstance(kept, RunEvaluation) or kept.part != part:
        if isinstance(kept, RunEvaluation):
            kept.release_student()
        kept = context.kept["evaluation"] = RunEvaluation(context=context, part=part)
    return kept
