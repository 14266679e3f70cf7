"""Speed: units of work over the seconds of the slowest rank, in the timed window."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.cell import PpoSettings
from bench.measure.physics import RATE_TOLERANCE
from bench.report.registry import TIME_GATES, NoValue, Trial, metric

COUNTS = "Lap.counts of the timed window"
WINDOW = "Lap.counts and Lap.seconds of the timed window"


@metric(title="loss tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def loss_tokens_per_second(trial: Trial) -> float:
    """Tokens that carry loss, summed over data-parallel ranks, over the elapsed time of the slowest rank in the timed window.
    Never a mean of rates and never a mean over ranks, which hides the straggler.
    """
    return trial.rate("loss_tokens")


@metric(title="tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def tokens_per_second(trial: Trial) -> float:
    """Tokens that are not padding, prompts included, over the same window."""
    return trial.rate("tokens")


@metric(title="padded tokens/s", unit="tokens/s", direction="none", source=WINDOW, stages=("sft", "rm"), clocked=True)
def padded_tokens_per_second(trial: Trial) -> float:
    """Tokens with padding over the same window: what the device computed, useful or not."""
    return trial.rate("padded_tokens")


@metric(title="sequences/s", unit="sequences/s", direction="higher", source=WINDOW, clocked=True)
def sequences_per_second(trial: Trial) -> float:
    """Sequences over the same window; a sample of the reward model is a preference pair, two sequences. PPO: rollouts, each also
    learned from.
    """
    return trial.rate("sequences")


@metric(title="loss tokens/s per device", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def loss_tokens_per_second_per_device(trial: Trial) -> float:
    """Loss tokens/s divided by every rank of the job."""
    return trial.rate("loss_tokens") / trial.cell.world_size


@metric(title="samples/s", unit="samples/s", direction="higher", source=WINDOW, clocked=True)
def samples_per_second(trial: Trial) -> float:
    """Rows of the data over the same window: sequences, or preference pairs of the reward model (two sequences each). PPO: prompts."""
    return trial.rate("sequences") / (2 if trial.cell.stage == "rm" else 1)


@metric(title="step time", unit="s", direction="lower", source=WINDOW, clocked=True)
def step_seconds(trial: Trial) -> float:
    """Median over the laps of the window: seconds of the slowest rank / steps of the lap. PPO: seconds of an iteration (one rollout and
    its learning).
    """
    window = trial.timed()
    return median(max(seconds) / steps for seconds, steps in zip(window.seconds_by_lap, window.steps_by_lap, strict=True) if steps)


@metric(title="straggler ratio", unit="x", direction="lower", source=WINDOW, clocked=True)
def straggler_ratio(trial: Trial) -> float:
    """Seconds of the slowest rank over those of the median rank, summed over the window."""
    totals = trial.timed().seconds_by_rank
    if len(totals) < 2:
        raise NoValue("one rank has no straggler")
    return max(totals) / median(totals)


@metric(title="slowest node", unit="x", direction="lower", source=WINDOW, clocked=True)
def slowest_node_ratio(trial: Trial) -> float:
    """Median step time of the slowest node over that of the median node, a node being as slow as its slowest rank in each lap."""
    times = node_step_seconds(trial)
    if len(times) < 2:
        raise NoValue("one node has no other to be slower than")
    return max(times.values()) / median(times.values())


def node_step_seconds(trial: Trial) -> dict[int, float]:
    """Median over the laps of the window, for every node by its number: seconds of the node's slowest rank / steps of the lap."""
    window = trial.timed()
    nodes = [part.node for part in sorted(trial.record.parts, key=lambda part: part.rank)]
    found: dict[int, list[float]] = {node: [] for node in sorted(set(nodes))}
    for seconds, steps in zip(window.seconds_by_lap, window.steps_by_lap, strict=True):
        for node, laps in found.items():
            laps.append(max(value for value, place in zip(seconds, nodes, strict=True) if place == node) / max(steps, 1))
    return {node: median(laps) for node, laps in found.items()}


@metric(title="padding efficiency", unit="share of tokens", direction="higher", source=COUNTS, stages=("sft", "rm"))
def padding_efficiency(trial: Trial) -> float:
    """Tokens that are not padding / tokens with padding, over the timed window. A count, so it holds on any machine."""
    if trial.window is None:
        raise NoValue("no lap was finished")
    tokens, padded = trial.window.total("tokens"), trial.window.total("padded_tokens")
    if tokens is None or not padded:
        raise NoValue("the laps do not count tokens and padded_tokens")
    return tokens / padded


@metric(title="time to first step", unit="s", direction="lower", source="Part.seconds", clocked=True)
def time_to_first_step(trial: Trial) -> float:
    """From the start of a rank to the end of its first step: import, load, shard, compile. Slowest rank."""
    values = [part.seconds["time_to_first_step"] for part in trial.record.parts if "time_to_first_step" in part.seconds]
    if not values:
        raise NoValue("no rank finished a first step")
    return max(values)


# -- physics -----------------------------------------------------------------------------------------------------


def impossible_counts(trial: Trial) -> Iterator[str]:
    """More work counted than the cell gives, or more seconds in laps than the whole trial took."""
    window = trial.window
    if window is None:
        return
    counts, settings = window.counts, trial.cell.settings
    rows, asked = counts.get("sequences"), window.steps * _rows_per_step(trial)
    if rows is not None and rows > asked * (1 + RATE_TOLERANCE):
        yield f"more work than there was: {rows} sequences counted in {window.steps} steps, which have {asked}"
    for unit in ("loss_tokens", "tokens"):
        units, padded = counts.get(unit), counts.get("padded_tokens")
        if units is not None and padded is not None and units > padded:
            yield f"more work than there was: {units} {unit.replace('_', ' ')} of {padded} tokens with padding"
    written, longest = counts.get("response_tokens"), getattr(settings, "response_length", None)
    if rows is not None and written is not None and longest is not None and written > rows * longest:
        yield f"more work than there was: {written} response tokens in {rows} sequences of at most {longest}"
    yield from _impossible_seconds(trial)


def _rows_per_step(trial: Trial) -> int:
    """Sequences of one step (PPO: of one iteration) over all ranks."""
    cell = trial.cell
    if isinstance(cell.settings, PpoSettings):
        return cell.settings.prompts_per_iteration * (cell.step_batch // cell.settings.global_batch)
    return cell.step_batch * (2 if cell.stage == "rm" else 1)


def _impossible_seconds(trial: Trial) -> Iterator[str]:
    window, whole = trial.window, trial.record.observed.get("seconds")
    if window is not None and isinstance(whole, (int, float)) and window.elapsed > whole:
        yield f"tokens and time do not match: laps of {window.elapsed:.1f} s in a trial that the supervisor saw last {whole:.1f} s"


TIME_GATES.append(impossible_counts)
