"""An independent classifier of a data set, and the report on samples that it makes possible."""

import torch

from genkern._extras import extra
from genkern.data import check_data
from genkern.metrics import _distances
from genkern.models._base import ink
from genkern.ops._common import check_int, check_tensor


class Classifier:
    """Two scikit-learn models of small images, trained on real ones; generative models never see either.

    A support vector machine with a Gaussian kernel says what an image shows; the hidden layer of a small perceptron gives features.
    images (N, C, H, W): uint8 in 0..levels or float in [-1, 1]; labels int64 (N,), all classes at least once. The same arguments give
    the same classifier. Needs scikit-learn, of the extra "models"; seconds for thousands of small images.
    """

    def __init__(self, images, labels, *, levels=255, features=64, seed=0):
        MLPClassifier = extra("Classifier", "sklearn.neural_network", "scikit-learn").MLPClassifier
        SVC = extra("Classifier", "sklearn.svm", "scikit-learn").SVC
        for name, value, least in (("levels", levels, 1), ("features", features, 1), ("seed", seed, 0)):
            check_int("Classifier", name, value, least)
        self.levels, self.shape = levels, tuple(getattr(images, "shape", ())[1:])
        x = self._pixels(images)
        labels = _distances.integers("Classifier", labels, len(x))
        self.classes = int(labels.max()) + 1
        if self.classes < 2 or len(labels.unique()) < self.classes:
            raise ValueError(f"Classifier: labels must be 0..{self.classes - 1}, each at least once, and of two classes or more")
        self._machine = SVC(C=10.0, gamma="scale").fit(x, labels.numpy())
        self._network = MLPClassifier((features,), alpha=1e-3, max_iter=150, tol=0.0, n_iter_no_change=150, random_state=seed)
        _fit_quietly(self._network, x, labels.numpy())

    @classmethod
    def of(cls, data, **settings):
        """Trained on the training split of a genkern.data set with labels."""
        check_data("Classifier", data)
        images, labels = data.train
        if labels is None or data.levels is None or len(data.shape) != 3:
            raise ValueError(f"Classifier: needs uint8 images with labels, and {data.name} is not such")
        return cls(images, labels, levels=data.levels, **settings)

    def labels(self, images):
        """The class of each image: int64 (N,)."""
        return torch.from_numpy(self._machine.predict(self._pixels(images))).long()

    def accuracy(self, images, labels):
        """The share of the images that show their label."""
        shown = self.labels(images)
        return float((shown == _distances.integers("Classifier", labels, len(shown))).double().mean())

    def shares(self, images):
        """The share of each class among the images: float64 (classes,)."""
        return _distances.class_shares(self.labels(images), self.classes)

    def features(self, images):
        """The perceptron's hidden layer relu(x W + b): float64 (N, features)."""
        x = torch.from_numpy(self._pixels(images)).double()
        weight, bias = (torch.from_numpy(values[0]).double() for values in (self._network.coefs_, self._network.intercepts_))
        return torch.relu(x @ weight + bias)

    def _pixels(self, images):
        """numpy (N, pixels) of ink in [0, 1]."""
        check_tensor("Classifier", "images", images)
        x = ink(images.detach().cpu(), self.levels)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"Classifier: images must be (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if len(x) == 0:
            raise ValueError("Classifier: there are no images")
        return x.flatten(1).float().numpy()


def report(samples, data, labels=None, *, classifier=None):
    """How samples of a model of `data` (small images with labels) compare with the real ones: a dict of floats and one list.

    accuracy            the share of the samples that show their label, where labels (N,) are given
    accuracy_real       the same of the held-out images: what the classifier can see at all
    shares              of each class among the samples
    frechet             squared Frechet distance of the samples' features to those of the training images
    frechet_real        the same of the held-out images: the least to hope for
    precision, recall, density, coverage    against the training images; the ..._real ones again of the held-out images. These and the
                        Frechet distance depend on the number of samples: they are means over parts as large as the held-out set
    nearest             the median distance from a sample to its nearest training image, in root mean square ink in [0, 1]
    nearest_real        the same of the held-out images. Where `nearest` is far below it, the samples are copies
    copies              the share of the samples nearer to a training image than all but 1 % of the held-out images are: 0.01 for new
                        images, 1 for copies

    samples: at least as many as the data's validation and test images together. classifier: by default Classifier.of(data).
    """
    check_data("report", data)
    check_tensor("report", "samples", samples)
    judge = Classifier.of(data) if classifier is None else classifier
    if not isinstance(judge, Classifier):
        raise TypeError(f"report: classifier must be a Classifier, got {type(judge).__name__}")
    train, held = data.train[0], torch.cat([data.validation[0], data.test[0]])
    if len(samples) < len(held):
        raise ValueError(f"report: needs at least {len(held)} samples, as many as held-out images, got {len(samples)}")
    found = {} if labels is None else {"accuracy": judge.accuracy(samples, labels)}
    found["accuracy_real"] = judge.accuracy(held, torch.cat([data.validation[1], data.test[1]]))
    found["shares"] = judge.shares(samples).tolist()

    real, size = judge.features(train), len(held)
    parts = judge.features(samples[: len(samples) // size * size]).split(size)
    for suffix, sets in (("", parts), ("_real", [judge.features(held)])):
        values = [_compared(real, x) for x in sets]
        found.update({name + suffix: sum(v[name] for v in values) / len(values) for name in values[0]})

    pixels = lambda x: ink(x.detach().cpu(), judge.levels).flatten(1).double()
    near, near_real = (_distances.nearest_neighbours(pixels(x), pixels(train)).distance for x in (samples, held))
    scale = samples[0].numel() ** -0.5
    found["nearest"], found["nearest_real"] = float(near.median()) * scale, float(near_real.median()) * scale
    found["copies"] = float((near < near_real.quantile(0.01)).double().mean())
    return found


def _compared(real, fake):
    near, dense = _distances.precision_recall(real, fake), _distances.density_coverage(real, fake)
    return {"frechet": _distances.frechet_distance(fake, real), **near._asdict(), **dense._asdict()}


def _fit_quietly(network, x, labels):
    """A fixed number of passes; scikit-learn would warn that the loss might still fall."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(x, labels)
