"""Preference tuning with TRL's DPOTrainer: the student is policy and reference, on exactly the ids of the pairs.

TRL and the transformers Trainer do the work; what is replaced here is what they would do with files and the network:
answers are not tokenised again, reference log-probabilities stay in memory, checkpoints hold no pickles and say when
they are whole, no tracker reports that a training began, and TRL writes no model card.

Nothing in the training draws random numbers but the order of the pairs, which is a function of seed and epoch, so that
checkpoints keep no state of generators.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from limbeck.models.quiet import quiet_transformers
from limbeck.recipe.preference import PreferenceSection
from limbeck.rollouts.preference.pairs import PreferencePair
from limbeck.runtime.console import Console, Meter
from limbeck.training import dpo_checkpoints
from limbeck.types import Interrupted, Json, LimbeckError

# Of what TRL logs, that which is a function of the step alone: it counts tokens from where a process began.
LOGGED = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


def dpo_steps(settings: PreferenceSection, pairs: int) -> int:
    """Optimizer steps of a training on so many pairs."""
    micro = math.ceil(pairs / settings.per_device_train_batch_size)
    per_epoch = math.ceil(micro / settings.gradient_accumulation_steps)
    return settings.max_steps or math.ceil(settings.num_train_epochs * per_epoch)


def tune_preferences(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    settings: PreferenceSection,
    *,
    seed: int,
    device: torch.device,
    checkpoints: Path,
    console: Console,
    should_stop: Callable[[], bool],
) -> list[Json]:
    """Train the model in place, from the newest whole checkpoint on; returns what was logged of each step.

    Args:
        seed: of the order of the pairs.

    Raises:
        Interrupted: stopped on request, with a checkpoint.
        LimbeckError: the loss is no number any more.
    """
    total = dpo_steps(settings, len(pairs))
    start = dpo_checkpoints.last_whole(checkpoints, console.warn)
    done = 0 if start is None else dpo_checkpoints.saved_step(start)
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    # accelerate keeps the first precision of a process for good.
    AcceleratorState._reset_state()
    with console.meter("prefer", total, "steps", done) as meter, warnings.catch_warnings():
        # TRL reads attributes of models that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = _PairTrainer(
            model=model,
            args=_arguments(settings, checkpoints, total, seed, device),
            train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
            # TRL sets a padding token.
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[_Watch(meter, should_stop)],
        )
        trainer.keep = settings.save_total_limit
        trainer.remove_callback(PrinterCallback)
        if done == total:
            assert start is not None
            trainer._load_from_checkpoint(str(start))
            history = _history(start)
        else:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            history = trainer.state.log_history
    if done < total and trainer.state.global_step < total:
        raise Interrupted(f"stopped after step {trainer.state.global_step} of {total}")
    # The student is saved as it came, and not with what TRL put there.
    model.config, model.generation_config = config, generation
    return [{key: row[key] for key in LOGGED} for row in history if "rewards/margins" in row]


def _row(pair: PreferencePair) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(pair.chosen.prompt_ids),
        "chosen_ids": list(pair.chosen.response_ids),
        "rejected_ids": list(pair.rejected.response_ids),
    }


def _history(checkpoint: Path) -> list[Json]:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history


def _arguments(
    settings: PreferenceSection, checkpoints: Path, total: int, seed: int, device: torch.device
) -> DPOConfig:
    # Its name from transformers 5.20 on, where the old one warns.
    named = "activation_checkpointing" in {field.name for field in fields(DPOConfig)}
    checkpointing = {"activation_checkpointing" if named else "gradient_checkpointing": settings.gradient_checkpointing}
    return DPOConfig(
        output_dir=str(checkpoints),
        max_steps=total,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(settings.warmup_ratio * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        beta=settings.beta,
        loss_type=[settings.loss_type],
        label_smoothing=settings.label_smoothing,
        bf16=settings.bf16,
        **checkpointing,  # pyright: ignore[reportArgumentType]
        seed=seed,
        data_seed=seed,
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        # The ids are those that were sampled, which fit.
        max_length=None,
        # One model in memory instead of two, and one pass of the reference, whatever the epochs.
        precompute_ref_log_probs=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=device.type != "cpu",
    )


class _Watch(TrainerCallback):
    """Moves the bar, and ends the training on request or where it has gone wrong."""

    def __init__(self, meter: Meter, should_stop: Callable[[], bool]):
        self.meter, self.should_stop = meter, should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.advance(1)
        if self.should_stop():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise LimbeckError(
                f"prefer: the loss is {loss} at step {state.global_step}; lower preference.learning_rate"
            )


class _PairTrainer(DPOTrainer):
    """TRL's trainer on pairs of token ids.

    Attributes:
        keep: whole checkpoints that stay.
    """

    keep: int = 1

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        collate: Any = self.data_collator
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
            found = self.compute_ref_log_probs(self.model, self._prepare_inputs(collate(rows)))
            for column, logps in zip(columns.values(), found, strict=True):
                column.extend(logps.float().tolist())
        for column, logps in columns.items():
            dataset = dataset.add_column(column, logps)
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody asked for it."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run writes its own."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights alone: settings and tokenizer are the run's, and the Trainer would pickle the former."""
        model: Any = self.model
        with quiet_transformers():
            model.save_pretrained(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        dpo_checkpoints.seal(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", keep=self.keep)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        dpo_checkpoints.save_optimizer(Path(output_dir), *self._plain())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            dpo_checkpoints.restore_optimizer(Path(checkpoint), *self._plain())

    def _plain(self) -> tuple[torch.optim.Optimizer, Any]:
        """Optimizer and schedule without what accelerate wraps around them."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        return getattr(optimizer, "optimizer", optimizer), getattr(scheduler, "scheduler", scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        """No generator is used."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """No generator is used."""
