"""Train one adapter, and its head, on one or several domains; stop early once all floors hold; survive being killed.

Each step takes one batch of one domain: domains take turns by weight (boxes learn slowly and get more), and after each check
those further below their floor get more turns (the others are replayed). Where their pace in the later half of the checks
would not bring all to their floors in the steps that are left, the one that needs most is let go, for the others' sake.

A run lives in a folder: a checkpoint while it lasts, and at its end a PEFT folder with its head and `result.json`, whose
presence says that it is done. All that is random is drawn from (seed, step), so a run killed at any moment and started again
gives the same adapter; on a GPU this holds as far as its kernels are deterministic, which `repeatable` asks for.

Source of the recipe (LoRA on q, k, v, o; dropout; a head trained with the adapter): VaLoRA (EuroSys 2025).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.fusion import checkpoint
from engine.fusion.domains import Domain
from engine.fusion.evaluate import evaluate
from engine.fusion.merged import merge_heads, merged_factors
from engine.fusion.metrics import Score
from engine.fusion.task_heads import Head, write_head
from engine.fusion.whole_folder import put_in_place
from engine.fusion.wording import QUERIES
from engine.fusion.workbench import Workbench
from traces.whole_file import replace_text

RESULT, CHECKPOINT, ADAPTER = "result.json", "training.safetensors", "adapter"
WARMUP_STEPS = 20
BOX_STEPS = 3
"""Boxes are learnt slowly: queries compete for them (DETR trains ten times as long as its rivals), or words name them."""
REPLAY = 0.5
SHORT = 0.6
"""Turns of a domain above its floor, and the fewest of one below it, against 1 for the one furthest below. With few turns it
is forgotten within tens of steps: domains share a head, and each batch pushes the other domains' rows down."""
JOINT_RATE = 0.5
"""Of the learning rate, where domains go on jointly from adapters that are trained: at all of it accuracies swing."""
EXTRA_SHARE = 1.0
"""A run over k domains may take (EXTRA_SHARE + k) / (EXTRA_SHARE + 1) times the steps of one: 6.5 times for twelve."""
PATIENT_SHARE = 0.3
"""Of the steps that a joint run may take, before it lets go of a domain: accuracy often rises late."""
PROGRESS = 0.02
"""The sum of what domains lack to their floors, in shares of the floors, must fall by so much to count as progress."""
ACTIVATION_BYTES = 40 << 30
BYTES_PER_ACTIVATION = 34
"""Kept for the backward pass per token, layer and hidden unit in 16 bit (Korthikanti et al. 2022, without dropout masks)."""


@dataclass(frozen=True)
class Recipe:
    """steps: of one domain at most, BOX_STEPS times as many for boxes. check_every: steps between evaluations
    of the decide split (and checkpoints), where there are few domains.

    patience: a run with floors ends after so many checks without one more of them held and without coming nearer to them
    (over one domain: and without a lower loss).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    learning_rate: float = 1e-3
    batch: int = 32
    steps: int = 300
    check_every: int = 50
    patience: int = 4
    seed: int = 0

    def interval(self, domains: int) -> int:
        """Steps between the checks of a run over so many domains: often, since joint runs may end at any; evaluating many
        must not outweigh the training."""
        return self.check_every if domains == 1 else max(1, self.check_every * (1 + domains // 6) // 2)

    def steps_of(self, domain: Domain) -> int:
        """The most optimizer steps of the domain's own adapter."""
        return self.steps * BOX_STEPS if domain.boxed else self.steps

    def cap(self, domains: Sequence[Domain]) -> int:
        """The most steps of a run over these domains at once."""
        mean = sum(map(self.steps_of, domains)) / len(domains)
        return round(mean * (EXTRA_SHARE + len(domains)) / (EXTRA_SHARE + 1))


@dataclass(frozen=True)
class Task:
    """What a run does. domains: the order they came in; trained: those that give batches. floors: None trains to the cap.

    start: folders of the runs whose adapters and heads, merged, it goes on from. decode: without a head, whatever the
    domains say.
    """

    domains: tuple[str, ...]
    trained: tuple[str, ...]
    cap: int
    floors: Mapping[str, float] | None = None
    start: tuple[Path, ...] = ()
    decode: bool = False


@dataclass(frozen=True)
class Result:
    """scores: of every domain on the decide split. steps, seconds: of this run. history: (step, loss since the last, if any,
    accuracies).

    milestones: (step, domains held) of the checks at which more floors held than ever before.
    """

    scores: dict[str, Score]
    steps: int
    seconds: float
    history: list = field(default_factory=list)
    milestones: list = field(default_factory=list)


def read_result(folder: Path) -> Result | None:
    """The result of a finished run, or None."""
    path = folder / RESULT
    if not path.exists():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    scores = {name: Score(*values) for name, values in told["scores"].items()}
    return Result(scores, told["steps"], told["seconds"], told["history"], told["milestones"])


def load_run(bench: Workbench, folder: Path, domains: Sequence[str], seed: int) -> Head:
    """Put a run's adapter on the bench; a head for `domains` that knows what the run's head knew."""
    return load_merged(bench, (folder,), domains, seed)


def load_merged(bench: Workbench, folders: Sequence[Path], domains: Sequence[str], seed: int) -> Head:
    """The same of several runs at once, their adapters and heads merged (`engine.fusion.merged`)."""
    from peft import load_peft_weights, set_peft_model_state_dict

    adapters = [folder / ADAPTER for folder in folders]
    weights = [load_peft_weights(str(folder), device="cpu", use_safetensors=True) for folder in adapters]
    set_peft_model_state_dict(bench.peft, merged_factors(weights))
    head = new_head(bench, domains, seed)
    merge_heads(head, adapters)
    return head


def new_head(bench: Workbench, domains: Sequence[str], seed: int) -> Head:
    """An untrained head of these domains, on the bench's device."""
    return Head([bench.domain(name) for name in domains], bench.model.shape.hidden, seed).to(bench.device)


def repeatable(bench: Workbench):
    """A context in which a small model's training is the same each time: it can afford attention in plain matrices."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.MATH]
    if bench.device.type == "cuda" and not bench.graphed:
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends)


def train(bench: Workbench, folder: Path, task: Task, recipe: Recipe, safe) -> Result:
    """Do the run, or the rest of it, or nothing if it is done. safe(score, domain): the accuracy that can be counted on.

    OutOfTime, after a checkpoint, where the bench's deadline has passed.
    """
    done = read_result(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with repeatable(bench):
        run = _Run(bench, folder, task, recipe, safe)
        run.resume()
        while not run.finished:
            run.step_on()
        return run.close()


class _Run:
    """A training under way: the head, the optimizer, and the turns that domains are owed."""

    def __init__(self, bench: Workbench, folder: Path, task: Task, recipe: Recipe, safe):
        self.bench, self.folder, self.task, self.recipe, self.safe = bench, folder, task, recipe, safe
        self.head: Head | None = None
        if task.start:
            self.head = load_merged(bench, task.start, task.domains, recipe.seed)
        else:
            bench.reset(recipe.seed)
            self.head = None if task.decode else new_head(bench, task.domains, recipe.seed)
        kept = self.head.named_parameters() if self.head is not None else ()
        of_head = {f"head.{name}": p for name, p in kept if p.numel()}
        self.parameters = bench.lora | of_head
        self.optimizer = checkpoint.optimizer_of(self.parameters, recipe.learning_rate, 0.0)
        self.share = {name: recipe.steps_of(bench.domain(name)) / recipe.steps for name in task.trained}
        self.state = {
            "step": 0, "owed": dict.fromkeys(task.trained, 0.0), "weight": dict(self.share),
            "history": [], "milestones": [], "best": [-1, 1e9, 1e9], "stale": 0, "seconds": 0.0, "stop": False, "scores": {},
            "turns": dict.fromkeys(task.trained, 0), "gaps": {name: [] for name in task.trained},
        }  # fmt: skip
        self.started = time.monotonic()
        self.recent: list[torch.Tensor] = []

    @property
    def jointly(self) -> bool:
        """True where several domains are trained until their floors hold."""
        return self.task.floors is not None and len(self.task.trained) > 1

    @property
    def finished(self) -> bool:
        return self.state["stop"] or self.state["step"] >= self.task.cap

    def resume(self) -> None:
        found = checkpoint.load(self.folder / CHECKPOINT)
        if found is not None:
            checkpoint.restore(found[0], self.parameters, self.optimizer)
            self.state = found[1]
            self.bench.log(f"{self._name()}: goes on at step {self.state['step']}")

    def _name(self) -> str:
        return f"{self.folder.name} [{', '.join(self.task.domains)}]"

    def step_on(self) -> None:
        """One optimizer step, and at times a check."""
        state, recipe = self.state, self.recipe
        step = state["step"]
        if step == 0 and self.jointly and self.task.start and not state["history"]:
            self._check()
            if state["stop"]:
                return
        name = self._turn()
        rng = np.random.default_rng([recipe.seed, step])
        sample = self.bench.sample(name, "train")
        index = rng.choice(len(sample), min(recipe.batch, len(sample)), replace=False).tolist()
        warm, left = min(1.0, (step + 1) / WARMUP_STEPS), 1 - 0.9 * step / self.task.cap
        rate = recipe.learning_rate * (JOINT_RATE if self.jointly and self.task.start else 1.0)
        self.optimizer.param_groups[0]["lr"] = rate * warm * left
        devices = [self.bench.device] if self.bench.device.type == "cuda" else []
        self.bench.peft.train()
        with torch.random.fork_rng(devices):  # dropout draws from the global generator; this leaves it as it was
            torch.manual_seed(int(rng.integers(1 << 62)))
            self.optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=self.bench.device)
            at_once = examples_at_once(self.bench, name)
            for start in range(0, len(index), at_once):
                part = index[start : start + at_once]
                share = batch_loss(self.bench, self.head, name, part) * (len(part) / len(index))
                share.backward()
                loss += share.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.recent.append(loss)
        state["step"] = step + 1
        if state["step"] % recipe.interval(len(self.task.domains)) == 0 and not self.finished:
            self._check()
            self._save()

    def _turn(self) -> str:
        """Whose turn it is: the domain that is owed most, the first of equals."""
        owed, weight = self.state["owed"], self.state["weight"]
        total = sum(weight.values())
        for name in owed:
            owed[name] += weight[name] / total
        chosen = max(owed, key=lambda name: owed[name])
        owed[chosen] -= 1
        self.state["turns"][chosen] += 1
        return chosen

    def _check(self) -> None:
        """Evaluate; turn the weights to where accuracy is missing; stop when all is well, or nothing improves."""
        if self.task.floors is None:
            self._note({})
            return
        kept = self.state["weight"] if self.jointly else self.task.domains
        scores = {name: evaluate(self.bench, name, "decide", self.head) for name in kept}
        self._note(scores)
        short = {}
        for name, score in scores.items():
            floor = self.task.floors[name]
            short[name] = (floor - self.safe(score, name)) / max(floor, 1e-9)
        names, worst = [name for name, gap in short.items() if gap <= 0], max(short.values())
        held = len(names)
        lacking = sum(max(0.0, gap) for gap in short.values())
        state, (most, least, lowest) = self.state, self.state["best"]
        loss = lowest if state["history"][-1][1] is None else state["history"][-1][1]
        learns = len(short) == 1 and loss < lowest * (1 - PROGRESS)  # before it shows: boxes are found late
        if held > max(most, 0):
            state["milestones"].append([state["step"], names])
        if held == len(short):
            state["stop"] = True
        elif held > most or lacking < least - PROGRESS or learns:
            state["best"], state["stale"] = [max(held, most), min(lacking, least), min(loss, lowest)], 0
        else:
            state["stale"] += 1
            state["stop"] = state["stale"] >= self.recipe.patience
        for name in state["weight"]:
            turns = max(SHORT, short[name] / worst) if short[name] > 0 else REPLAY
            state["weight"][name] = turns * self.share[name]
        if self.jointly and not state["stop"]:
            self._let_go(short)

    def _let_go(self, short: Mapping[str, float]) -> None:
        """Give up the domain that needs most, where all need more steps than are left. short: shares of floors that lack."""
        state, needed = self.state, {}
        for name, gap in short.items():
            state["gaps"][name].append([state["turns"][name], gap])
            seen = state["gaps"][name]
            if gap > 0:  # the pace of the later half
                turns, before = seen[(len(seen) - 1) // 2]
                pace = (before - gap) / max(1, state["turns"][name] - turns)
                needed[name] = gap / pace if pace > 0 else float("inf")
        if state["step"] < PATIENT_SHARE * self.task.cap or sum(needed.values()) <= self.task.cap - state["step"]:
            return
        dropped = max(needed, key=lambda name: (needed[name], short[name]))
        self.bench.log(f"{self._name()}: lets go of {dropped}")
        for turns in (state["owed"], state["weight"]):
            del turns[dropped]
        state["stop"] = len(state["weight"]) < 2 or all(gap <= 0 for name, gap in short.items() if name != dropped)

    def _note(self, scores: Mapping[str, Score]) -> None:
        loss = float(torch.stack(self.recent).mean()) if self.recent else None
        self.recent = []
        accuracies = {name: round(score.value, 4) for name, score in scores.items()}
        self.state["history"].append([self.state["step"], loss, accuracies])
        self.state["scores"] = {name: list(score) for name, score in scores.items()}
        told = f"step {self.state['step']}/{self.task.cap}" + (f", loss {loss:.3f}" if loss is not None else "")
        self.bench.log(f"{self._name()}: {told} " + " ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))

    def _save(self) -> None:
        now = time.monotonic()
        self.state["seconds"] += now - self.started
        self.started = now
        tensors = checkpoint.training_tensors(self.parameters, self.optimizer)
        checkpoint.save(self.folder / CHECKPOINT, tensors, self.state)
        checkpoint.stop_if_late(self.bench.deadline)

    def close(self) -> Result:
        """Evaluate unless just done, write adapter, head and result, in this order, and drop the checkpoint."""
        state = self.state
        if not state["stop"] or len(state["scores"]) < len(self.task.domains):
            self._note({name: evaluate(self.bench, name, "decide", self.head) for name in self.task.domains})
        unfinished, target = self.folder / f".{ADAPTER}.partial", self.folder / ADAPTER
        shutil.rmtree(unfinished, ignore_errors=True)
        self.bench.peft.save_pretrained(str(unfinished), safe_serialization=True)
        if self.head is not None and self.head.rows:
            domains = [self.bench.domain(name) for name in self.task.domains]
            write_head(unfinished, self.head, domains, self.bench.wording.query_ids)
        put_in_place(unfinished, target)
        seconds = state["seconds"] + time.monotonic() - self.started
        told = {"domains": self.task.domains, "steps": state["step"], "seconds": round(seconds, 3),
                "scores": state["scores"], "history": state["history"], "milestones": state["milestones"],
                "recipe": asdict(self.recipe)}  # fmt: skip
        replace_text(self.folder / RESULT, json.dumps(told, indent=1) + "\n")
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        result = read_result(self.folder)
        assert result is not None
        return result


def examples_at_once(bench: Workbench, name: str) -> int:
    """Examples whose activations fit ACTIVATION_BYTES; a larger batch is split and its gradients are summed.

    A model small enough for graphs is never split: a graph's gradients lie in its own memory, where no sum may be kept.
    """
    shape, sample = bench.model.shape, bench.sample(name, "train")
    if bench.graphed:
        return len(sample)
    tokens = sample.features.shape[1] * shape.image_tokens + max(map(len, sample.queried)) + max(map(len, sample.answers))
    return max(1, ACTIVATION_BYTES // (tokens * shape.layers * shape.hidden * BYTES_PER_ACTIVATION))


def batch_loss(bench: Workbench, head: Head | None, name: str, index: Sequence[int]) -> torch.Tensor:
    """The loss of a batch of one domain's training split: of the head where the domain has one, else of the answer."""
    sample = bench.sample(name, "train")
    domain = sample.domain
    if head is None or not domain.head:
        length = sample.answered_length if bench.graphed else 0
        packed = bench.wording.pack([(sample.plain[i], sample.answers[i]) for i in index], length)
        hidden = bench.training_hidden(sample, index, packed)
        rows, columns, targets = (t.to(bench.device) for t in (packed.rows, packed.columns, packed.targets))
        return torch.nn.functional.cross_entropy(bench.model.hf.lm_head(hidden[rows, columns]).float(), targets)
    tails = sample.queried if domain.boxed else sample.plain
    packed = bench.wording.pack([(tails[i], []) for i in index], sample.queried_length if bench.graphed else 0)
    hidden = bench.training_hidden(sample, index, packed)
    rows = torch.arange(len(index), device=bench.device)
    last = packed.last.to(bench.device)
    if not domain.boxed:
        return head.class_loss(hidden[rows, last], domain, [sample.labels[i] for i in index])
    columns = last[:, None] + torch.arange(1 - QUERIES, 1, device=bench.device)
    return head.box_loss(hidden[rows[:, None], columns], domain, [sample.boxes[i] for i in index])
