"""Writes docs/performance.md and its picture from the measured figures alone."""

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
GPU = Path(__file__).parent / "gpu.json"

NAMES = {
    "watched": "gwa_logging",
    "watched, ledger": "gwa_logging, ledger",
    "watched, wandb": "gwa_logging, W&B",
    "watched, mlflow": "gwa_logging, MLflow",
    "watched, tensorboard": "gwa_logging, TensorBoard",
    "watched, trackio": "gwa_logging, Trackio",
    "published form": "published form",
    "wandb.watch, 1000": "wandb.watch, default (log_freq=1000)",
    "wandb.watch, 100": "wandb.watch, log_freq=100",
    "wandb.watch, 1": "wandb.watch, a step that logs",
    "torch.func": "torch.func, head's per-sample gradients",
    "BackPACK": "BackPACK, head's per-sample gradients",
    "again": "bare against bare (noise)",
}

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

PERIODS = {"wandb.watch, 1000": 1000, "wandb.watch, 100": 100}
EVERY = 50
"""Steps between two histograms: the default of log_every_n_steps."""


SCORING = ("ours", "ours, compiled", "published, factored", "published, product")


def mean_of(name: str, group: dict[str, Any]) -> float:
    """Mean overhead in per cent.

    NaN if the measurement was shorter than the period of something that happens at every n-th step. For wandb.watch the mean is
    computed from the times of a step that logs and of one that does not.
    """
    row = group["steps"][name]
    if name == "again" or name.startswith(("published", "torch.func", "BackPACK", "wandb.watch, 1 ")):
        return float(row["mean"])
    if name in PERIODS and "wandb.watch, 1" in group["steps"]:
        logging = group["steps"]["wandb.watch, 1"]["median"]
        return float(row["median"] + (logging - row["median"]) / PERIODS[name])
    return float(row["mean"]) if group["rounds"] >= EVERY or name == "wandb.watch, 1" else math.nan


def cheapest(group: dict[str, Any]) -> tuple[str, float]:
    """Name and mean overhead of the cheapest alternative in a group."""
    peers = [name for name in group["steps"] if not name.startswith(("watched", "again", "wandb.watch, 1"))]
    peers += [name for name in PERIODS if name in group["steps"]]
    costs = {name: mean_of(name, group) for name in peers}
    name = min(costs, key=lambda each: costs[each])
    return name, costs[name]


def number(value: float, digits: int = 1) -> str:
    """A number with its sign; a dash for NaN."""
    return DASH if math.isnan(value) else f"{value:+.{digits}f}".replace("-", MINUS)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def steps_table(groups: dict[str, Any]) -> str:
    """The table of all groups, one row per step."""
    rows = []
    for title, group in groups.items():
        first = f"**{title}**, {group['bare_ms']:.1f} ms, {group['rounds']:,} rounds"
        for name, shown in NAMES.items():
            if name in group["steps"]:
                row = group["steps"][name]
                interval = f"[{number(row['low'])}, {number(row['high'])}]"
                rows.append(
                    [
                        first,
                        shown,
                        f"{number(row['median'])} % {interval}",
                        f"{number(mean_of(name, group))} %".replace(f"{DASH} %", DASH),
                    ]
                )
            elif name in group["missing"]:
                rows.append([first, shown, group["missing"][name], DASH])
            else:
                continue
            first = ""
    return table(["bare step", "what is added", "median [95 % interval]", "mean"], rows)


def scoring_table(sizes: dict[str, Any], ways: tuple[str, ...], unit: str = "us") -> str:
    """The table of the scoring alone."""
    rows = []
    for size, row in sizes.items():
        ours = row["ours"][unit]
        cells = [f"{row[way][unit]:,.0f} µs ({row[way][unit] / ours:.1f}x)" for way in ways if unit in row[way]]
        rows.append([size, f"{row['limit_us']:,.0f} µs", f"{ours / row['limit_us']:.2f}", *cells])
    return table(["B x D x C", "limit", "ours / limit", *(f"{way} (x ours)" for way in ways)], rows)


WHY_MISSED = """Where a target is missed: a step of about a millisecond pays for the hooks and for five small operations, in a
compiled model for a gradient that leaves its graph, and every 50th step for a histogram, whatever the size of the model; and a
head that dominates the step pays for reading its logit gradients and its weight once more (last column)."""


def targets(results: dict[str, Any]) -> str:
    """The tables of targets and of the cheapest alternatives, with what was measured."""
    groups, rows = results["groups"], []
    for title, group in groups.items():
        watched, noise = group["steps"]["watched"], group["steps"]["again"]
        limit = 8.0 if "MLP" in title and title.startswith("PyTorch") else 1.0
        if group["bare_ms"] < 40 and limit == 1.0:
            continue  # no target
        met = "yes" if watched["median"] <= limit else "within the noise" if watched["low"] <= limit else "no"
        noise_cell = f"[{number(noise['low'])}, {number(noise['high'])}]"
        reading = 100 * group["read_bytes"] / results["scoring"]["copy_gb_per_s"] / 1e6 / group["bare_ms"]
        cells = [f"{number(watched['median'])} %", f"+{limit:.0f} %", met, noise_cell, f"{reading:.1f} %"]
        rows.append([title, *cells])
        if limit == 8.0:
            ledger, mean = group["steps"]["watched, ledger"], mean_of("watched", group)
            further = (("mean", mean, 10.0), ("with ledger", ledger["median"], 12.0))
            for what, value, most in further:
                rows.append(
                    [
                        f"{title}, {what}",
                        f"{number(value)} %",
                        f"+{most:.0f} %",
                        "yes" if value <= most else "no",
                        "",
                        "",
                    ]
                )
    first = table(["step", "watched, median", "at most", "met", "noise, 95 % interval", "reading alone"], rows)
    rows = []
    for title, group in groups.items():
        name, cost = cheapest(group)
        mean = mean_of("watched", group)
        ours = group["steps"]["watched"]["median"] if math.isnan(mean) else mean
        low, high = group["steps"]["again"]["low"], group["steps"]["again"]["high"]
        verdict = "yes" if ours <= cost else "within the noise" if ours - cost <= max(high - low, 0.5) else "no"
        rows.append([title, f"{number(ours)} %", f"{NAMES[name]}: {number(cost)} %", verdict])
    second = table(["step", "watched, mean", "cheapest peer, mean", "ours is cheaper"], rows)
    return f"{first}\n\n{WHY_MISSED}\n\n{second}"


def gpu_section() -> str:
    """The section on GPUs, from the figures of `benchmarks.gpu` if there are any."""
    if not GPU.exists():
        return "Not measured yet: `python -m benchmarks.gpu --json benchmarks/gpu.json` on a machine with a GPU."
    results = json.loads(GPU.read_text())
    machine = results.pop("machine")
    rows, counts = [], []
    for part, row in results.items():
        if part == "scoring" or "error" in row:
            continue
        cells = [f"{number(row[name]['median'], 2)} % [{number(row[name]['low'], 2)}, {number(row[name]['high'], 2)}]"
                 for name in ("watched", "ledger", "again")]  # fmt: skip
        rows.append([part, f"{row['bare_ms']:.1f} ms", *cells, f"{number(row['watched']['mean'], 2)} %"])
        checked, launched = row["checked"], row["launches"]
        waits = {name: len(found["synchronisations"]) for name, found in checked.items()}
        peak = checked["watched"]["peak_mb"] - checked["bare"]["peak_mb"]
        counts.append([
            part, f"{launched['bare']['launches']:.1f}", f"{launched['watched']['launches']:.1f}",
            f"{launched['ledger']['launches']:.1f}", ", ".join(f"{name} {n}" for name, n in waits.items()),
            f"{checked['bare']['peak_mb']:,.1f} MB", f"{number(peak, 2)} MB",
        ])  # fmt: skip
    failed = [f"{part}: {row['error']}" for part, row in results.items() if "error" in row]
    text = (
        f"{machine['device']}, PyTorch {machine['torch']}. B = 256, bfloat16 autocast; `python -m benchmarks.gpu`. "
        f"{machine.get('note', '')}\n\n"
        + table(["step", "bare", "watched", "with ledger", "bare against bare", "watched, mean"], rows)
        + "\n\nKernel launches per step; the number of places where the host waited for the device in 50 steps, "
        "including a flush; and the peak of device memory:\n\n"
        + table(["step", "launches, bare", "watched", "ledger", "waits", "peak, bare", "watched, more"], counts)
    )
    if "sizes" in results.get("scoring", {}) or "copy_gb_per_s" in results.get("scoring", {}):
        scoring = results["scoring"]
        sizes = {size: row for size, row in scoring.items() if isinstance(row, dict)}
        ways = ("ours", "ours, compiled", "published, factored")
        text += f"\n\nThe scoring alone, in device time; a copy reaches {scoring['copy_gb_per_s']:,.0f} GB/s:\n\n"
        text += scoring_table(sizes, ways, "device_us" if "device_us" in next(iter(sizes.values()))["ours"] else "us")
    return text + "".join(f"\n\nNot measured: {line}" for line in failed)


def scale_section(scale: dict[str, Any]) -> str:
    """The section on the cost model."""
    rows = []
    for point in scale["points"]:
        for name in ("sent_bytes", "received_bytes", "ledger_bytes"):
            rows.append([str(point["ranks"]), name.replace("_", " ") + " of a rank", f"{point['measured'][name]:,.0f}",
                         f"{point['model'][name]:,.0f}"])  # fmt: skip
        lines = f"{point['measured']['intervals']}", f"{point['model']['intervals_per_epoch']:.0f}"
        rows.append([str(point["ranks"]), "intervals in the journal", *lines])
        journal = f"{point['measured']['journal_bytes']:,.0f}", f"{point['model']['journal_bytes']:,.0f}"
        rows.append([str(point["ranks"]), "bytes of intervals in the journal", *journal])
    ends = ", ".join(f"{p['ranks']}: {p['measured']['end_epoch_ms']:,.1f} ms" for p in scale["points"])
    merging = ", ".join(f"{world}: {ms:.1f} ms" for world, ms in scale["merging_ms"].items())
    large, long = scale["large"], scale["long"]
    measured = f", {scale['date']}" if "date" in scale else ""
    return f"""Without a ledger, nothing that a rank stores, sends or writes depends on the length of an epoch, except the
journal, which grows with the number of intervals: one line of {scale["line_bytes"]:,.0f} bytes each. After 10,000 intervals,
the length of an interval doubles whenever the length of the run does. Each rank keeps its part of the ledger, and at the end
of an epoch it sends the others 16 bytes for each sample that it has scored. The runs (`python -m benchmarks.scale`{measured})
have uneven numbers of steps, and check that every sample is counted once, by the rank that keeps it.

{table(["ranks", "what", "measured", "model"], rows)}

`end_epoch` on a rank, median, by ranks (gloo; all ranks share the CPUs of this machine): {ends}. Merging the summaries of this
number of ranks on one rank: {merging}.{_lost(scale["lost"])}

The model at 1,024 ranks and 1e9 samples per epoch, 256 of them per step on each rank, which gives {large["steps"]:,.0f} steps:

- a step: no communication, no wait, and no transfer to the host except {large["to_host_bytes"] / 1e3:,.0f} KB over the whole
  epoch;
- an epoch: each rank sends {scale["summary_bytes"]:,.0f} bytes once and receives
  {scale["summary_bytes"] * 1024 / 1e6:.1f} MB, and merges them in the time given above;
- the journal: only rank 0 writes, at first {large["intervals_per_epoch"]:.0f} intervals and
  {large["journal_bytes_per_epoch"] / 1e3:,.0f} KB per epoch; a run of 1,000 such epochs,
  {1000 * large["steps"]:,.0f} steps, writes {long["journal_bytes"] / 1e6:,.0f} MB;
- the queue: a record waits in the journal until a tracker takes it; the latest 4 MB are kept in memory;
- the ledger, if enabled: {large["ledger_bytes"] / 1e6:.1f} MB on each rank, 12 bytes for each of its samples. The scores of an
  epoch wait in 13 bytes each until it ends. Then a rank sorts them, in {scale["compact_ms"]:,.0f} ms on this machine,
  sends {large["sent_bytes"] / 1e6:.1f} MB and receives {large["received_bytes"] / 1e6:.1f} MB in all. `suspects(100)` gathers
  4 KB of each rank. A stop alert keeps a copy of each rank's part; a stop rule that watches the agreement keeps 8 bytes per
  sample. Save with `state_dict(whole_ledger=False)`, one file for each rank: the default collects the ledger of all ranks on
  each, and so do `suspects_table()` and `label_quality()`."""


def _lost(lost: dict[str, Any]) -> str:
    """What happened when a rank died."""
    if not lost["ranks"]:
        return ""
    return (
        f" When one of {lost['ranks']} ranks\ndies in the middle of an epoch, `end_epoch` ends with PyTorch's own error "
        f"({', '.join(lost['errors'])}) on the\nothers, here within {lost['seconds']:.1f} s; the journal has the "
        f"{lost['intervals']} intervals until then."
    )


def picture(groups: dict[str, Any], path: Path) -> None:
    """Draws the overheads of all steps, one panel per group."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    columns = 3
    figure, axes = plt.subplots(
        -(-len(groups) // columns), columns, figsize=(15, 2.6 * -(-len(groups) // columns)), squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (title, group) in zip(axes.flat, groups.items(), strict=False):
        names = [name for name in reversed(NAMES) if name in group["steps"] and name != "wandb.watch, 1"]
        values = [group["steps"][name]["median"] for name in names]
        errors = [
            [max(0.0, group["steps"][name]["median"] - group["steps"][name]["low"]) for name in names],
            [max(0.0, group["steps"][name]["high"] - group["steps"][name]["median"]) for name in names],
        ]
        colors = ["#1f6fb4" if n.startswith("watched") else "#999999" if n == "again" else "#d9822b" for n in names]
        axis.barh(range(len(names)), values, xerr=errors, color=colors, error_kw={"elinewidth": 1})
        axis.set_yticks(range(len(names)), [NAMES[name].split(", head's")[0] for name in names], fontsize=7)
        axis.set_xscale("symlog", linthresh=1)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(1, color="#2a8a3e", linewidth=0.8, linestyle="--")
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{title}, {group['bare_ms']:.1f} ms", fontsize=9)
    figure.supxlabel(
        "% over the bare step, median with its 95 % interval (linear to 1 %, then logarithmic)", fontsize=9
    )
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write(results: dict[str, Any], docs: Path = DOCS) -> Path:
    """Writes the page and its picture, and returns the path of the page."""
    picture(results["groups"], docs / "images" / "performance.png")
    machine, scoring = results["machine"], results["scoring"]
    product = ", ".join(f"{row['product_rows']} rows ({size})" for size, row in scoring["sizes"].items())
    text = f"""# Performance

Written by `make bench`, including the figures: {machine["date"]}, {machine["cpu"]}, {machine["cpus"]} CPUs,
{machine["system"]}, Python {machine["python"]}, PyTorch {machine["torch"]} on one thread, JAX {machine["jax"]}.
Load of the machine at the start: {machine["load"]:.2f}.

## Overhead of a step

Copies of one model take turns step by step in one process, in a different order each round. Overheads are relative to the
bare step of the same round. There are two bare steps per round; comparing them gives the measurement noise. A step under 20
ms runs three times per turn, and the first time is not counted, so that the caches are as warm as in training. Everything is
on: scores at every step, a histogram every 50 steps, the journal on disk.

The mean includes work that is done only at every n-th step. It is omitted where fewer than 50 rounds were run; the comparison
then uses the median. A histogram takes about 1 ms, divided among four of 50 steps (`python -m benchmarks.longest_step`). For
wandb.watch the mean is computed from a step that logs and one that does not. Values below zero are noise, or a compiler that
fuses the step differently.

![Overheads of all steps](images/performance.png)

`reading alone` is the time to read the inputs of the scores once, at the speed of a copy, as a share of the step. No
implementation outside the loss's own code can be cheaper. In the rows with words and with 21,843 classes the head dominates
the step, so this share is large.

{targets(results)}

{steps_table(results["groups"])}

`published form`: scores in closed form from labels, logits and embeddings at every step, kept in a list. The B x C x D product
is factored, as in the published JAX code, which is the cheaper variant. `torch.func` and `BackPACK` compute the per-sample
gradients of the head only, and score them. W&B is offline and logs nothing else.

## The scoring alone

One thread; a copy of 256 MB reads and writes {scoring["copy_gb_per_s"]:.1f} GB/s. The limit is the time to read the inputs of
the score once at that speed: delta, z, h, W, or delta, dL/dh, h, W if there are more classes than features. Reading is faster
than copying, so a ratio can be below one; the smallest size fits into the cache.

{scoring_table(scoring["sizes"], SCORING)}

`published, product` materialises the B x C x D product. It was timed on {product} and scaled, since its time is proportional
to the rows.

## On a GPU

{gpu_section()}

## At scale

{scale_section(results["scale"])}
"""
    path = docs / "performance.md"
    path.write_text(text)
    return path
