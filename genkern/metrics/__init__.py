"""Measures of samples: how near they are to real data, how varied, and whether they are copies.

    data = genkern.data.load("digits")
    report(model.sample(1000, key=key), data)              # all of what follows, as one dict

    judge = Classifier.of(data)                            # scikit-learn, trained on the real training images only
    judge.accuracy(images, labels)                         # do the samples show what they should?
    judge.shares(images)                                   # how often each class occurs
    frechet_distance(judge.features(a), judge.features(b))
    precision_recall(judge.features(real), judge.features(samples))
    nearest_neighbours(samples, train)

The distances take features (N, d) of any kind. They are computed in float64 on the CPU, give the same figure in any order of the rows
(to rounding) and store no N x N matrix. A Frechet distance depends on the features and the number of samples: compare only figures of
one classifier and equal N.

    baselines(data)                                        # what a likelihood model must beat: bits per dimension of simple ones
"""

from genkern.metrics._baselines import baselines
from genkern.metrics._classifier import Classifier, report
from genkern.metrics._coders import lpc_bits, ngram_bits, png_bits
from genkern.metrics._densities import Gaussian, histogram_log_prob
from genkern.metrics._distances import class_shares, density_coverage, frechet_distance, nearest_neighbours, precision_recall

__all__ = [
    "baselines",
    "Gaussian",
    "histogram_log_prob",
    "lpc_bits",
    "ngram_bits",
    "class_shares",
    "Classifier",
    "density_coverage",
    "frechet_distance",
    "nearest_neighbours",
    "png_bits",
    "precision_recall",
    "report",
]
