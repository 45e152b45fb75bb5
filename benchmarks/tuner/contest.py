"""How fast one adapter is trained: KAITO's settings, TRL at its best, and our tuner, on the same weights and chats.

    python -m benchmarks.tuner.contest                                            # on a CPU, 15 min
    python -m benchmarks.tuner.contest --size phi-3-mini --length 512 2048 8192 --steps 60 --warm-up 10   # on a GPU
    python -m benchmarks.tuner.contest --size tiny --rounds 1 --steps 4 --check-steps 20                  # to try it

Each contestant is a process of its own, from raw chats to a saved adapter, one after the other in each round; nothing
is cached between them. Counted are tokens that are not padding. Speed is that from the end of the warm-up steps to the
end of the last step, whatever happens in between (ours writes checkpoints; the others have none), the median of the
rounds.

First comes the check that ours computes the right thing, with the size `tiny` in float32: its loss at each step is that
of a plain loop, and what a packed chat loses is what it loses alone.

`pip install trl` is needed besides (see README.md).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from benchmarks.tuner.material import LINEAR, SIZES, write_chats, write_weights
from benchmarks.tuner.running import FailedError, Outcome, run_in_turn
from benchmarks.tuner.trial import Trial
from kaito_flows.planning.cost import training_flops
from kaito_flows.planning.shapes import lora_parameters
from kaito_flows.presets.loader import load_preset

CONTESTANTS = ("kaito", "trl packed", "trl packed-1", "trl grouped", "ours")
TIMES_KAITO, TIMES_TRL = 5.0, 1.3
TOLERANCE = 1e-2
PACKAGES = ("kaito-flows", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "liger-kernel")
FLOPS = {"H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations in a second at most, by what a GPU's name holds (NVIDIA's data sheets)."""


def main() -> int:
    """Measure, and print tables; 1 when ours computes something else, or misses a limit on a GPU."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = _environment(given.device)
        gpu = _gpu() if environment["CUDA_VISIBLE_DEVICES"] else ""
        say(_surroundings(gpu))
        right = not given.check_steps or check(folder / "check", given.check_steps, environment)
        (folder / "contest").mkdir()
        weights = folder / "contest/weights"
        write_weights(given.size, weights)
        count = given.chats or (10_000 if gpu else 1000)
        chats = write_chats(folder / "contest/chats.jsonl", count, given.size)
        fast = True
        for length in given.length:
            trial = Trial(
                weights, chats.path, folder, length, given.tokens_a_step or (32768 if gpu else 4096),
                given.micro_tokens or (8192 if gpu else 2048), chats.mean(length), given.steps, given.dtype,
                not given.no_recompute, attention=given.trl_attention,
            )  # fmt: skip
            # Attention reaches no further than a chat: a token's share of that is what counts for the limit.
            fast &= contest(trial, given, environment, gpu, chats.reach(length))
    return int(not (right and fast))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model; phi-3-mini is for GPUs")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU, where there is one")
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="tokens of the longest row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, help="in the file: 10000 on a GPU, 1000 on a CPU")
    parser.add_argument("--tokens-a-step", type=int, help="32768 on a GPU, 4096 on a CPU")
    parser.add_argument("--micro-tokens", type=int, help="tokens at once: 8192 on a GPU, 2048 on a CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-recompute", action="store_true", help="keep activations (KAITO's settings never do)")
    parser.add_argument("--trl-attention", default="", help="what TRL attends with, if not by what is installed")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME")
    parser.add_argument("--check-steps", type=int, default=200, help="0: do not check what ours computes")
    given = parser.parse_args()
    if not 0 < given.warm_up < given.steps:
        parser.error("--warm-up must be at least 1, and below --steps")
    if min(given.length) < 64:
        parser.error("--length must be at least 64")
    return given


def check(folder: Path, steps: int, environment: Mapping[str, str]) -> bool:
    """Hold ours against the plain loop, and packed chats against lone ones; print both, return whether they agree."""
    folder.mkdir()
    write_weights("tiny", folder / "weights")
    chats = write_chats(folder / "chats.jsonl", 300, "tiny")
    trial = Trial(
        folder / "weights", chats.path, folder / "ours", 512, 2048, 1024, chats.mean(512), steps, "float32",
        recompute=False, learning_rate=2e-3, shuffle=False,
    )  # fmt: skip
    ours = run("ours", trial, environment)
    plain = run_in_turn([["benchmarks.tuner.reference", str(trial.folder / "trial.json")]], trial.folder, environment)
    apart = max(abs(a.loss - b.loss) for a, b in zip(ours.steps, plain.steps, strict=True))
    packed = plain.facts["furthest"]
    say(
        f"\nfloat32, {steps} steps of a tiny Phi-3, loss {plain.steps[0].loss:.4f} to {plain.steps[-1].loss:.4f}: "
        f"ours is at most {apart:.2g} from the plain loop's at any step; packed chats are at most {packed:.2g} from "
        f"lone ones (limit {TOLERANCE:g})"
    )
    return apart <= TOLERANCE and packed <= TOLERANCE


def contest(trial: Trial, given: argparse.Namespace, environment: Mapping[str, str], gpu: str, reach: int) -> bool:
    """Let all run, and print the table of one length; return whether ours is as much faster as promised."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in given.contestants}
    loads = [os.getloadavg()[0]]
    for number in range(given.rounds):
        for name in given.contestants:
            folder = trial.folder / f"{trial.length}/{number}/{name.replace(' ', '-')}"
            outcome = run(name, replace(trial, folder=folder), environment)
            outcomes[name].append(outcome)
            loads.append(os.getloadavg()[0])
            wall, cpu = outcome.speed(given.warm_up)
            sys.stderr.write(f"{trial.length} round {number + 1}: {name} {wall:.0f} tokens/s, {cpu:.0f} a CPU second\n")
    say(
        f"\n{given.size}, rows of {trial.length}, {trial.tokens_a_step} tokens a step, {given.steps} steps, of which "
        f"{given.warm_up} warm up, {trial.dtype}, recomputation {'on' if trial.recompute else 'off'}, {given.rounds} "
        f"rounds, load {min(loads):.1f} to {max(loads):.1f}\n"
    )
    _table(outcomes, trial, given, gpu, reach)
    # On a CPU that others use, CPU seconds say more than the clock; lowest, highest and learned are in them, too.
    speeds = {name: _median([o.speed(given.warm_up)[0 if gpu else 1] for o in done]) for name, done in outcomes.items()}
    return _ratios(speeds, outcomes) or not gpu


def _table(
    outcomes: Mapping[str, Sequence[Outcome]], trial: Trial, given: argparse.Namespace, gpu: str, reach: int
) -> None:
    limit = next((flops for name, flops in FLOPS.items() if name in gpu), None) if given.size == "phi-3-mini" else None
    heads = ["", "tokens/s", "a CPU second", "lowest to highest", "of these learned", "peak MB"]
    heads += [*(["of the limit"] if limit else []), "first step s", "job s", "job CPU s", "loss, first and last"]
    say(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for name, done in outcomes.items():
        speeds = [outcome.speed(given.warm_up) for outcome in done]
        wall, cpu = (_median([speed[i] for speed in speeds]) for i in (0, 1))
        spread = sorted(speed[0 if gpu else 1] for speed in speeds)
        peak = _median([o.gpu.get("allocated", o.peak_bytes) for o in done]) / 1e6
        steps = done[0].steps
        cells = [name, f"{wall:,.0f}", f"{cpu:,.0f}", f"{spread[0]:,.0f} to {spread[-1]:,.0f}"]
        cells += [f"{(wall if gpu else cpu) * done[0].trained_share:,.0f}", f"{peak:,.0f}"]
        if limit:
            cells.append(f"{wall * _flops(trial.r, reach, trial.recompute or name == 'kaito') / limit:.1%}")
        cells += [f"{_median([o.steps[0].seconds for o in done]):.1f}", f"{_median([o.seconds for o in done]):.1f}"]
        cells += [f"{_median([o.cpu_seconds for o in done]):.1f}", f"{steps[0].loss:.3f}, {steps[-1].loss:.3f}"]
        say(f"| {' | '.join(cells)} |")
    told = {name: done[0].facts for name, done in outcomes.items() if name != "ours"}
    say("\n" + "; ".join(f"{name}: {facts}" for name, facts in told.items()))


def _flops(r: int, reach: int, recompute: bool) -> float:
    preset = load_preset("phi-3-mini-4k-instruct")
    return training_flops(preset, lora_parameters(preset.architecture, LINEAR, r), reach, recompute=recompute)


def _ratios(speeds: Mapping[str, float], outcomes: Mapping[str, Sequence[Outcome]]) -> bool:
    good = True
    if "ours" not in speeds:
        return good
    if "kaito" in speeds:
        times = speeds["ours"] / speeds["kaito"]
        good &= times >= TIMES_KAITO
        say(f"\nours is {times:.2f} times KAITO's settings (limit on a GPU: {TIMES_KAITO:g})")
    if trl := {name: speed for name, speed in speeds.items() if name.startswith("trl")}:
        best = max(trl, key=lambda name: trl[name])
        times = speeds["ours"] / trl[best]
        good &= times >= TIMES_TRL
        peaks = [_median([o.gpu.get("allocated", o.peak_bytes) for o in outcomes[name]]) for name in ("ours", best)]
        good &= peaks[0] <= peaks[1]
        say(
            f"ours is {times:.2f} times TRL at its best, which is {best!r} (limit on a GPU: {TIMES_TRL:g}), with "
            f"{peaks[0] / peaks[1]:.2f} times its peak memory (limit: 1)"
        )
    return good


def run(name: str, trial: Trial, environment: Mapping[str, str]) -> Outcome:
    """Run one contestant's whole job in the trial's folder."""
    kind, _, variant = name.partition(" ")
    path = str(replace(trial, variant=variant).write())
    commands = {
        "kaito": [["benchmarks.tuner.kaito", path]],
        "trl": [["benchmarks.tuner.sft", path]],
        "ours": [["benchmarks.tuner.prepare", path], ["benchmarks.tuner.ours", str(trial.folder / "job.json")]],
    }[kind]
    caches = {"HF_HOME": str(trial.folder / "hub"), "HF_DATASETS_CACHE": str(trial.folder / "datasets")}
    return run_in_turn(commands, trial.folder, {**environment, **caches})


def _environment(device: str) -> dict[str, str]:
    visible = "" if device == "cpu" or not _gpu() else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    one = {} if visible else {"OMP_NUM_THREADS": "1"}
    return {"CUDA_VISIBLE_DEVICES": visible, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **one}


def _gpu() -> str:
    from kaito_flows.planning.machine import this_machine

    return this_machine().gpu_model


def _surroundings(gpu: str) -> str:
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} is not installed"

    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = models[0] if models else "a CPU that says no name"
    memory = psutil.virtual_memory().total / 1e9
    where = gpu or f"no GPU, one thread of {os.cpu_count()} cores"
    packages = ", ".join(map(installed, PACKAGES))
    return f"{time.strftime('%Y-%m-%d %H:%M %Z')}: {where}, {cpu}, {memory:.0f} GB; {packages}"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FailedError as exc:
        raise SystemExit(str(exc)) from exc
