"""Reduces the raw signals of a run to the series that criteria and tables need: some numbers for each epoch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.study.grid import DATA, Run
from gwa_logging.consensus import Consensus, read_logits, read_predictions
from gwa_logging.histogram import Histogram
from gwa_logging.statistic import estimate

Series = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]

SUSPECT_SCORES = ("gwa", "gwa x size", "aum", "loss", "confidence", "forgetting", "el2n")
"""Scores that tell wrong labels; "auroc" and "precision" have a column for each. "size": of the gradient of the logits."""

KEPT = [
    "test_accuracy",
    "averaged_test_accuracy",
    "held_out_accuracy",
    "averaged_held_out_accuracy",
    "held_out_loss",
    "mean",
    "excess_kurtosis",
    "sign_agreement",
    "changed",
    "train_loss",
    "disparity",
    "head_norm",
    "grad_stop",
]
"""Raw series that are kept as they are."""


def reduced(run: Run, raw: Series) -> Series:
    """The series of a run; `raw` is what `train` returned."""
    series = {name: raw[name] for name in KEPT if name in raw}
    if run.part == "folds":
        return cleanlab_series(raw)
    if run.part == "full":
        series |= score_series(raw["bins"]) | look_series(raw, DATA[run.data].classes)
        if raw["flipped"].any():
            series |= suspect_series(raw)
    return {name: _rounded(values) for name, values in series.items()}


def score_series(bins: npt.NDArray[np.int32]) -> Series:
    """Statistics of the scores' histograms, int32 [epochs, bins], with their standard errors."""
    histograms = [Histogram.from_dense(row) for row in bins]
    series: dict[str, list[float]] = {"negative": [histogram.negative_fraction for histogram in histograms]}
    for statistic in ("separation", "stable", "mean"):
        found = [estimate(statistic, histogram) for histogram in histograms]
        series[f"{statistic}_value"] = [one.value for one in found]
        series[f"{statistic}_error"] = [one.standard_error for one in found]
    return {name: np.array(values) for name, values in series.items()}


def look_series(raw: Series, classes: int) -> Series:
    """The consensus and its variants for the weights in training, and the consensus for the averaged ones ("averaged_").

    "consensus" is what the library computes with sample ids. Variants: the consensus is formed by the looks' own outputs
    ("own_looks"), by training's softmax outputs ("softmax"), by all epochs so far ("all_epochs"); or the statistic is the
    look's mean alignment score with the consensus class as label ("alignment").
    """
    trained, series = raw["trained_outputs"].astype(np.float32), {}
    ids = np.arange(trained.shape[1])
    outputs = _softmax(trained)
    votes = np.eye(classes, dtype=np.float32)[trained.argmax(2)]
    for prefix in ("", "averaged_"):
        looks, bias = raw[f"{prefix}look"].astype(np.float32), raw[f"{prefix}look_bias"]
        voted, own = Consensus(), Consensus()
        rows: dict[str, list[float]] = {}
        for epoch, logits in enumerate(looks):
            look = read_logits(logits, ids)
            found = voted.add(look, read_predictions(trained[epoch].argmax(1).astype(np.int32), ids, classes))
            earlier = own.add(look)
            half = (epoch + 1) // 2 or 1
            by_votes = votes[:half].sum(0).argmax(1)
            rows.setdefault(f"{prefix}consensus", []).append(found.value if found else np.nan)
            if prefix:
                continue
            values = {
                "own_looks": earlier.value if earlier else np.nan,
                "softmax": _share(logits, outputs[:half].sum(0).argmax(1)),
                "all_epochs": _share(logits, votes[: epoch + 1].sum(0).argmax(1)),
                "alignment": _alignment(logits, bias[epoch], by_votes),
            }
            for name, value in values.items():
                rows.setdefault(name, []).append(value)
        series |= {name: np.array(values) for name, values in rows.items()}
    return series


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _share(logits: Floats, expected: npt.NDArray[np.int64]) -> float:
    """The share of each expected class that is predicted, averaged over the classes."""
    agrees = logits.argmax(1) == expected
    return float(np.mean([agrees[expected == c].mean() for c in np.unique(expected)]))


def _alignment(logits: Floats, bias: Floats, expected: npt.NDArray[np.int64]) -> float:
    """The mean cosine between the negative gradient of the logits and the logits without bias, with expected labels.

    This is the alignment score up to the factor |W h| / (|W| |h|), which differs little between inputs.
    """
    delta, z = _softmax(logits), logits - bias
    delta[np.arange(len(delta)), expected] -= 1
    sizes = np.linalg.norm(delta, axis=1) * np.linalg.norm(z, axis=1)
    return float(np.mean(-(delta * z).sum(1) / np.maximum(sizes, 1e-12)))


def suspect_series(raw: Series) -> Series:
    """AUROC and precision of each of `SUSPECT_SCORES`, [epochs, scores], by its mean over the epochs so far."""
    flipped = raw["flipped"]
    scores, sizes, losses, margins = (raw[name].astype(np.float64) for name in ("scores", "sizes", "losses", "margins"))
    right = margins > 0
    forgotten = np.concatenate([np.zeros_like(right[:1]), right[:-1] & ~right[1:]]).cumsum(0).astype(np.float64)
    forgotten[~np.logical_or.accumulate(right)] = np.inf  # never learnt
    suspicion = {
        "gwa": -scores.cumsum(0),
        "gwa x size": -(scores * sizes).cumsum(0),
        "aum": -margins.cumsum(0),
        "loss": losses.cumsum(0),
        "confidence": -np.exp(-losses).cumsum(0),
        "forgetting": forgotten,
        "el2n": sizes.cumsum(0),
    }
    epochs = range(len(scores))
    return {
        "auroc": np.array([[auroc(suspicion[name][e], flipped) for name in SUSPECT_SCORES] for e in epochs]),
        "precision": np.array([[precision(suspicion[name][e], flipped) for name in SUSPECT_SCORES] for e in epochs]),
    }


def cleanlab_series(raw: Series) -> Series:
    """AUROC and precision of cleanlab's scores from out-of-sample probabilities."""
    from cleanlab.rank import get_label_quality_scores

    series = {}
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        suspicion = -get_label_quality_scores(raw["labels"], raw["probabilities"], method=method)
        series[f"auroc_{method}"] = np.array(auroc(suspicion, raw["flipped"]))
        series[f"precision_{method}"] = np.array(precision(suspicion, raw["flipped"]))
    return series


def auroc(suspicion: Floats, flipped: npt.NDArray[np.bool_]) -> float:
    """Probability that a wrong label has a higher value than a right one; ties count half."""
    _, index, counts = np.unique(suspicion, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2.0)[index]
    wrong = int(flipped.sum())
    return float((ranks[flipped].sum() - wrong * (wrong + 1) / 2) / (wrong * (len(flipped) - wrong)))


def precision(suspicion: Floats, flipped: npt.NDArray[np.bool_]) -> float:
    """Share of wrong labels among the n highest values, where n is the number of wrong labels."""
    return float(flipped[np.argsort(-suspicion, kind="stable")[: int(flipped.sum())]].mean())


def _rounded(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 with a relative error below 1e-4, so that the archive is small."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 9)) & np.uint32(0xFFFFFC00)).view(np.float32)
