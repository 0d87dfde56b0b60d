"""Noise schedules: x_t = alpha x_0 + sigma n, and the points of it that a sampler visits. Float64 on the host."""

import math
from dataclasses import dataclass

import numpy as np

from genkern.ops._common import check_choice, check_int


@dataclass(frozen=True)
class Grid:
    """n points of a schedule and the end: what the model is told (t, n), alpha and sigma (n + 1), the factor of the model's input
    (n + 1), and x_0 = a x + b m from the model output m: pairs (a, b) (n)."""

    t: list
    alpha: list
    sigma: list
    scale: list
    data: list

    def __len__(self):
        return len(self.t)

    def since(self, begin):
        return Grid(*(values[begin:] for values in (self.t, self.alpha, self.sigma, self.scale, self.data)))

    def reversed(self, schedule):
        """From data to noise, for a variance preserving schedule: the model is told the point that is stepped to."""
        alpha, sigma = self.alpha[::-1], self.sigma[::-1]
        data = [estimate(schedule.prediction, a, s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
        return Grid(self.t[::-1], alpha, sigma, self.scale[::-1], data)


def estimate(prediction, a, s):
    """(of x, of m) in the estimate of x_0 from x = a x_0 + s n and the model output m."""
    known = {
        "epsilon": lambda: (1 / a, -s / a), "sample": lambda: (0.0, 1.0), "v_prediction": lambda: (a, -s), "flow": lambda: (1.0, -s),
    }  # fmt: skip
    return known[prediction]()


class Schedule:
    """A noise schedule together with what the model predicts.

        Schedule.linear(), .scaled_linear(), .cosine(), .sigmoid()      variance preserving, T discrete timesteps
        Schedule(alphas_cumprod)                                        the same from any cumulative product
        Schedule.flow(shift=3.0)                                        x_t = (1 - sigma) x_0 + sigma n (rectified flow)
        Schedule.edm()                                                  x_t = x_0 + sigma n (Karras et al., 2022)

    prediction  "epsilon" (the noise), "sample" (x_0), "v_prediction" (alpha n - sigma x_0; Salimans & Ho, 2022), "flow" (n - x_0), or
                "edm": the network inside the preconditioning of Karras et al., 2022, table 1
    zero_snr    rescales a variance preserving schedule to end in pure noise (Lin et al., 2023, algorithm 1)
    """

    def __init__(self, alphas_cumprod, prediction="epsilon", *, zero_snr=False):
        values = np.asarray(alphas_cumprod, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2 or not (np.diff(values) < 0).all() or values[0] > 1 or values[-1] < 0:
            raise ValueError("Schedule: alphas_cumprod must be one-dimensional and decrease within [0, 1]")
        check_choice("Schedule", "prediction", prediction, ("epsilon", "sample", "v_prediction"))
        if zero_snr:
            root = np.sqrt(values)
            values = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        self.kind, self.prediction, self.alphas_cumprod, self.timesteps = "preserving", prediction, values, len(values)

    @classmethod
    def from_betas(cls, betas, prediction="epsilon", *, zero_snr=False):
        """alphas_cumprod = prod(1 - beta) (Ho et al., 2020, section 2)."""
        return cls(np.cumprod(1 - np.asarray(betas, dtype=np.float64)), prediction, zero_snr=zero_snr)

    @classmethod
    def linear(cls, timesteps=1000, start=1e-4, end=0.02, **kwargs):
        """beta from start to end (Ho et al., 2020, section 4)."""
        check_int("Schedule.linear", "timesteps", timesteps, 2)
        return cls.from_betas(np.linspace(start, end, timesteps), **kwargs)

    @classmethod
    def scaled_linear(cls, timesteps=1000, start=0.00085, end=0.012, **kwargs):
        """sqrt(beta) linear, as in latent diffusion (Rombach et al., 2022) and Stable Diffusion."""
        check_int("Schedule.scaled_linear", "timesteps", timesteps, 2)
        return cls.from_betas(np.linspace(start**0.5, end**0.5, timesteps) ** 2, **kwargs)

    @classmethod
    def cosine(cls, timesteps=1000, offset=0.008, **kwargs):
        """alphas_cumprod = cos^2((t / T + s) / (1 + s) pi / 2), beta at most 0.999 (Nichol & Dhariwal, 2021, eq. 17)."""
        check_int("Schedule.cosine", "timesteps", timesteps, 2)
        bar = np.cos((np.arange(timesteps + 1) / timesteps + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - bar[1:] / bar[:-1], 0.999), **kwargs)

    @classmethod
    def sigmoid(cls, timesteps=1000, start=1e-4, end=0.02, **kwargs):
        """beta from start to end along a sigmoid of [-6, 6] (GeoDiff, Xu et al., 2022)."""
        check_int("Schedule.sigmoid", "timesteps", timesteps, 2)
        return cls.from_betas(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, timesteps))), **kwargs)

    @classmethod
    def flow(cls, shift=1.0, timesteps=1000, prediction="flow"):
        """sigma uniform in (0, 1], moved to shift sigma / (1 + (shift - 1) sigma) (Esser et al., 2024, eq. 23); the model is told
        timesteps x sigma."""
        check_choice("Schedule.flow", "prediction", prediction, ("flow", "sample"))
        if not shift > 0:
            raise ValueError(f"Schedule.flow: shift must be positive, got {shift}")
        self = cls.__new__(cls)
        self.kind, self.prediction, self.shift, self.timesteps = "flow", prediction, shift, timesteps
        return self

    @classmethod
    def edm(cls, sigma_min=0.002, sigma_max=80.0, rho=7.0, sigma_data=0.5, prediction="edm"):
        """sigma^(1 / rho) uniform (Karras et al., 2022, eq. 5). The network is told ln(sigma) / 4; with prediction="sample" a
        denoiser D(x, sigma) is told sigma and sees x unscaled."""
        check_choice("Schedule.edm", "prediction", prediction, ("edm", "sample"))
        self = cls.__new__(cls)
        self.kind, self.prediction, self.sigma_data = "edm", prediction, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        return self

    # ---- points

    def grid(self, steps, *, spacing="trailing", timesteps=None, sigmas=None, final="zero", offset=0, spare=0, exploding=False):
        """The Grid of a sampler.

        steps       number of steps; None with `timesteps` or an array of `sigmas`
        spacing     "trailing", "leading" or "linspace" (Lin et al., 2023, table 2): which of the discrete timesteps are visited
        timesteps   these timesteps instead, descending
        sigmas      "karras", "exponential", "beta": spacing of sigma / alpha instead; or an array of values
        final       where the last step goes: "zero" noise, or the noise of "first", the first timestep
        offset      added to the timesteps of "leading"
        spare       points laid out beyond `steps` and dropped at the end
        exploding   variance preserving schedules as x_0 + sigma n, the model's input scaled
        """
        check_choice("grid", "final", final, ("zero", "first"))
        if steps is not None:
            check_int("grid", "steps", steps)
        if self.kind == "flow":
            return self._flow_grid(steps, sigmas, spare)
        if self.kind == "edm":
            return self._edm_grid(steps, sigmas)
        if timesteps is not None:
            t = np.asarray(timesteps, dtype=np.float64)
            if t.ndim != 1 or len(t) == 0 or (np.diff(t) >= 0).any() or t[-1] < 0 or t[0] > self.timesteps - 1:
                raise ValueError(f"grid: timesteps must descend within [0, {self.timesteps - 1}], got {timesteps}")
        elif sigmas is None:
            t = spaced(self.timesteps, steps, spacing, offset, spare)
        every = np.arange(self.timesteps)
        ratios = np.sqrt((1 - self.alphas_cumprod) / np.maximum(self.alphas_cumprod, 1e-300))  # sigma / alpha
        if sigmas is not None:
            ratio = _sigmas(steps, sigmas, ratios[0], ratios[-1], 7.0)
            t = np.interp(np.log(ratio), np.log(ratios), every)
            bar = 1 / (1 + ratio**2)
        else:
            bar = np.interp(t, every, self.alphas_cumprod)  # timesteps between two are interpolated
        bar = np.append(bar, 1.0 if final == "zero" else self.alphas_cumprod[0])
        alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
        if self.prediction == "epsilon" and not alpha.all():
            raise ValueError("grid: a schedule that ends in pure noise (zero_snr) needs a model of sample or v_prediction")
        pairs = [estimate(self.prediction, a, s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
        scale = np.ones_like(alpha)
        if exploding:
            alpha = np.maximum(alpha, 2.0**-12)  # pure noise would be an infinite sigma
            alpha, sigma, scale = np.ones_like(alpha), sigma / alpha, alpha
            pairs = [(a * s, b) for (a, b), s in zip(pairs, scale, strict=False)]
        return _grid(t, alpha, sigma, scale, pairs)

    def _flow_grid(self, steps, sigmas, spare):
        if sigmas is None or isinstance(sigmas, str):
            if sigmas is not None:
                raise ValueError(f"grid: a flow takes sigmas as an array, got {sigmas!r}")
            n = steps
            sigma = np.linspace(1 - 1 / self.timesteps, 0, n + 1)[:-1] if spare else np.arange(n, 0, -1) / n
        else:
            sigma = np.asarray(sigmas, dtype=np.float64)
        sigma = np.append(self.shift * sigma / (1 + (self.shift - 1) * sigma), 0.0)
        pairs = [estimate(self.prediction, 1 - s, s) for s in sigma[:-1]]
        return _grid(self.timesteps * sigma[:-1], 1 - sigma, sigma, np.ones_like(sigma), pairs)

    def _edm_grid(self, steps, sigmas):
        sigma = _sigmas(steps, "karras" if sigmas is None else sigmas, self.sigma_min, self.sigma_max, self.rho)
        sigma = np.append(sigma, 0.0)
        if self.prediction == "sample":
            return _grid(sigma[:-1], np.ones_like(sigma), sigma, np.ones_like(sigma), [(0.0, 1.0)] * (len(sigma) - 1))
        data, total = self.sigma_data, np.sqrt(sigma**2 + self.sigma_data**2)
        pairs = [(data**2 / q**2, s * data / q) for s, q in zip(sigma[:-1], total[:-1], strict=True)]  # c_skip, c_out
        return _grid(np.log(sigma[:-1]) / 4, np.ones_like(sigma), sigma, 1 / total, pairs)


def _grid(t, alpha, sigma, scale, pairs):
    return Grid(*([float(v) for v in values] for values in (t, alpha, sigma, scale)), [(float(a), float(b)) for a, b in pairs])


def spaced(timesteps, steps, spacing, offset=0, spare=0):
    """Descending timesteps (steps,) of 0 ... timesteps - 1."""
    check_choice("grid", "spacing", spacing, ("trailing", "leading", "linspace"))
    n = steps + spare
    if n > timesteps:
        raise ValueError(f"grid: steps must be at most {timesteps - spare}, got {steps}")
    if spacing == "trailing":
        return np.round(timesteps - np.arange(steps) * (timesteps / steps)) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, timesteps - 1, n)[::-1][:steps])
    return (np.arange(n) * (timesteps // n))[::-1][:steps] + float(offset)


def _sigmas(steps, kind, low, high, rho):
    """Descending values of sigma / alpha (steps,)."""
    if not isinstance(kind, str):
        return np.asarray(kind, dtype=np.float64)
    check_choice("grid", "sigmas", kind, ("karras", "exponential", "beta"))
    u = np.linspace(0, 1, steps)
    if kind == "karras":  # Karras et al., 2022, eq. 5
        return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if not (math.isfinite(low) and low > 0):
        raise ValueError("grid: sigmas need a positive lowest sigma")
    if kind == "exponential":
        return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))
    return low + (high - low) * _beta_quantile(1 - u, 0.6)  # Lee et al., 2024: Beta(0.6, 0.6)


def _beta_quantile(u, a):
    """Quantiles of Beta(a, a): with p = sin^2 angle the density is (sin cos)^(2 a - 1), integrated by midpoints."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    middle = (angle[1:] + angle[:-1]) / 2
    mass = np.append(0.0, np.cumsum((np.sin(middle) * np.cos(middle)) ** (2 * a - 1)))
    return np.sin(np.interp(u, mass / mass[-1], angle)) ** 2
