"""The samplers: each a generator of rows of coefficients in closed form, float64.

Notation: a, s are alpha and sigma now, A, S at the next point; y is the estimate of x_0; lambda = ln(alpha / sigma).
"""

import math

import numpy as np

from genkern.ops._common import check_choice
from genkern.samplers._sampler import Row, Sampler


def _points(grid):
    """(i, a, s, A, S, row arguments) of every step."""
    for i in range(len(grid)):
        yield i, grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1], _arguments(grid, i)


def _arguments(grid, i):
    """What a Row says of the point where the model is called."""
    return {"t": grid.t[i], "scale": grid.scale[i], "data": grid.data[i], "level": (grid.alpha[i], grid.sigma[i])}


def _log_snr(alpha, sigma):
    return math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)


class DDPM(Sampler):
    """Ancestral sampling, x' ~ N(posterior mean, variance) (Ho et al., 2020, eq. 6, 7), respaced (Nichol & Dhariwal, 2021, section 4).

    variance    "small": the posterior's; "large": beta. For a model that returns twice the channels, as to the second half:
                "learned_range": the place between the two in the logarithm (Nichol & Dhariwal, 2021, eq. 15); "learned": the
                logarithm of the variance itself
    """

    kinds = ("preserving",)

    def __init__(self, schedule, steps=1000, *, variance="small", **kwargs):
        check_choice("DDPM", "variance", variance, ("small", "large", "learned_range", "learned"))
        self.variance, self.learned_variance = variance, variance.startswith("learned")
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        result = []
        for _, a, s, A, S, arguments in _points(grid):
            ratio = (a / A) ** 2
            beta, posterior = 1 - ratio, (S / s) ** 2 * (1 - ratio)
            sample = {"y": A * beta / s**2, "x": math.sqrt(ratio) * (S / s) ** 2}
            logs = math.log(max(posterior, 1e-20)), math.log(max(beta, 1e-20))
            if S > 0:
                sample["n"] = 1.0 if self.variance.startswith("learned") else math.exp(0.5 * logs[self.variance == "large"])
            if self.variance == "learned":
                logs = -1.0, 1.0  # between these the place v in [-1, 1] is v itself
            result.append(Row(**arguments, sample=sample, log_variance=logs))
        return result


class DDIM(Sampler):
    """x' = A y + sqrt(S^2 - d^2) eps + d n, d = eta times the deviation of DDPM (Song et al., 2021, eq. 12, 16).

    The direction eps is that of the model output, also where x_0 is clipped.

    inverse         from data to noise (Song et al., 2021, section 4.3): sample(model, start=x_0). The model is told the point that is
                    stepped to
    cfg_plus_plus   under guidance eps is the model's output without the condition, and y the guided one, so that guidance_scale is in
                    [0, 1] (CFG++; Chung et al., 2024, algorithm 2)
    """

    kinds = ("preserving",)

    def __init__(self, schedule, steps=50, *, eta=0.0, inverse=False, cfg_plus_plus=False, **kwargs):
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM: eta must be in [0, 1], got {eta}")
        if inverse and (eta or schedule.prediction == "sample"):
            raise ValueError("DDIM: inverse needs eta = 0, and a model of epsilon or v_prediction")
        self.eta, self.inverse, self.renoise_unconditional = eta, inverse, cfg_plus_plus
        self.history = int(cfg_plus_plus)
        super().__init__(schedule, steps, **kwargs)
        if inverse:
            self.grid = self.grid.reversed(schedule)

    def rows(self, grid):
        result = []
        for _, a, s, A, S, arguments in _points(grid):
            deviation = self.eta * S / s * math.sqrt(max(1 - (a / A) ** 2, 0.0)) if self.eta else 0.0
            direction = math.sqrt(max(S**2 - deviation**2, 0.0))
            from_x, from_m = arguments["data"]  # eps = (x - a (from_x x + from_m m)) / s, which without noise is m
            of_x, of_m = ((1 - a * from_x) / s, -a * from_m / s) if s else (0.0, 1.0)
            sample = {"y": A, "x": direction * of_x, "h1" if self.history else "m": direction * of_m, "n": deviation}
            result.append(Row(**arguments, sample=sample))
        return result


class LCM(Sampler):
    """Latent consistency models (Luo et al., 2023, algorithm 1): denoise by the boundary condition, add noise again.

    origin      steps of the schedule the model was distilled on, of which every (origin / steps)-th is visited
    """

    kinds = ("preserving",)

    def __init__(self, schedule, steps=4, *, origin=50, timestep_scaling=10.0, sigma_data=0.5, **kwargs):
        self.timestep_scaling, self.sigma_data = timestep_scaling, sigma_data
        if kwargs.get("timesteps") is None and kwargs.get("sigmas") is None:
            if not 0 < steps <= origin <= schedule.timesteps:
                raise ValueError(f"LCM: steps must be at most origin = {origin}, got {steps}")
            every = (np.arange(origin, 0, -1) * (schedule.timesteps // origin)) - 1
            kwargs["timesteps"] = every[np.floor(np.linspace(0, origin, steps, endpoint=False)).astype(int)]
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        result = []
        for i, _, _, A, S, arguments in _points(grid):
            scaled, data = arguments["t"] * self.timestep_scaling, self.sigma_data
            skip, kept = data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
            A, S = (1.0, 0.0) if i + 1 == len(grid) else (A, S)
            result.append(Row(**arguments, sample={"y": A * kept, "x": A * skip, "n": S}))
        return result


class Euler(Sampler):
    """dx / dsigma = (x - y) / sigma by Euler's method (Karras et al., 2022, algorithm 1 without churn)."""

    kinds = ("preserving", "edm")
    exploding = True

    def rows(self, grid):
        return [Row(**r, sample={"x": S / s, "y": 1 - S / s}) for _, _, s, _, S, r in _points(grid)]


class EulerAncestral(Euler):
    """Euler to a lower sigma, then noise back up to the next point.

    eta     the part of the noise: 0 is Euler
    """

    def __init__(self, schedule, steps=20, *, eta=1.0, **kwargs):
        if not 0 <= eta <= 1:
            raise ValueError(f"EulerAncestral: eta must be in [0, 1], got {eta}")
        self.eta = eta
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        result = []
        for _, _, s, _, S, arguments in _points(grid):
            up = self.eta * S * math.sqrt(max(s**2 - S**2, 0.0)) / s
            down = math.sqrt(S**2 - up**2)
            result.append(Row(**arguments, sample={"x": down / s, "y": 1 - down / s, "n": up}))
        return result


class Heun(Sampler):
    """The trapezoidal rule, two evaluations per step but the last (Karras et al., 2022, algorithm 1)."""

    kinds = ("preserving", "edm")
    exploding = True
    history = 1  # the sample at the beginning of the step

    def rows(self, grid):
        result = []
        for i, _, s, _, S, arguments in _points(grid):
            result.append(Row(**arguments, sample={"x": S / s, "y": 1 - S / s}, history={"x": 1.0}))
            if S > 0 and i + 1 < len(grid):
                half = (S - s) / (2 * S)
                result.append(Row(**_arguments(grid, i + 1), sample={"x": 0.5 + half, "h1": 0.5, "y": -half}, history={"x": 1.0}))
        return result


class FlowMatchEuler(Sampler):
    """x' = x + (S - s) v, v the predicted velocity n - x_0 (Lipman et al., 2023; Liu et al., 2023).

    stochastic  noise of the next point is drawn anew, x' = (1 - S) y + S n: for distilled models whose y is a sample, not a mean
    """

    kinds = ("flow",)

    def __init__(self, schedule, steps=20, *, stochastic=False, **kwargs):
        self.stochastic = stochastic
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        if self.stochastic:
            return [Row(**r, sample={"y": 1 - S, "n": S}) for *_, S, r in _points(grid)]
        return [Row(**r, sample={"x": S / s, "y": 1 - S / s}) for _, _, s, _, S, r in _points(grid)]  # v = (x - y) / s


class FlowMatchHeun(Heun):
    """The trapezoidal rule on the velocity, two evaluations per step but the last."""

    kinds = ("flow",)
    exploding = False


class DPMSolverMultistep(Sampler):
    """DPM-Solver++ in its multistep form, order 1 to 3, and its stochastic form (Lu et al., 2022b, algorithm 2 and appendix).

    order           1, 2 or 3; the first steps have lower orders, and with fewer than 15 steps the last ones (lower_order_final).
                    3 is the authors' formula, whose error is smaller but also of second order
    stochastic      SDE-DPM-Solver++
    solver          of the second order: "midpoint" or "heun"
    """

    spare = 1

    def __init__(self, schedule, steps=20, *, order=2, stochastic=False, solver="midpoint", lower_order_final=True, **kwargs):
        check_choice("DPMSolverMultistep", "order", order, (1, 2, 3))
        check_choice("DPMSolverMultistep", "solver", solver, ("midpoint", "heun"))
        self.order, self.stochastic, self.solver, self.lower_order_final = order, stochastic, solver, lower_order_final
        self.history = order - 1
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        logs = [_log_snr(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
        short, n, result = self.lower_order_final and len(grid) < 15, len(grid), []
        for i, _, s, A, S, arguments in _points(grid):
            order = min(self.order, i + 1)
            if S == 0 or (short and i == n - 1):
                order = 1
            elif short and i == n - 2:
                order = min(order, 2)
            if order > 1 and not math.isfinite(logs[i - order + 1]):  # pure noise has no lambda to extrapolate from
                order -= 1
            h = logs[i + 1] - logs[i]
            if h == 0:  # the last two sigmas may be equal (karras to the noise of the first timestep)
                order = 1
            step = 2 * h if self.stochastic else h
            lead = -A * math.expm1(-step)  # of y, and how much of x stays
            sample = {"x": S / s * (math.exp(-h) if self.stochastic else 1.0), "y": lead}
            if self.stochastic:
                sample["n"] = S * math.sqrt(-math.expm1(-step))
            if order > 1:
                slope = A * (1 + math.expm1(-step) / step)
            if order == 2:
                weight = (lead / 2 if self.solver == "midpoint" else slope) * h / (logs[i] - logs[i - 1])
                sample |= {"y": lead + weight, "h1": -weight}
            elif order == 3:
                curvature = A * (0.5 - (math.expm1(-step) + step) / step**2)
                r0, r1 = (logs[i] - logs[i - 1]) / h, (logs[i - 1] - logs[i - 2]) / h
                near = (slope * (2 * r0 + r1) + curvature) / (r0 + r1)  # of (y - h1) / r0
                far = -(slope * r0 + curvature) / (r0 + r1)  # of (h1 - h2) / r1
                sample |= {"y": lead + near / r0, "h1": far / r1 - near / r0, "h2": -far / r1}
            result.append(Row(**arguments, sample=sample))
        return result


class UniPC(Sampler):
    """UniPC, order 1 to 3, on x_0 (Zhao et al., 2023, algorithms 5 to 8).

    The corrected sample is a combination of the predicted one and the same history, so that the corrector costs no state.

    order       of the predictor; the corrector adds one order to it
    variant     "bh2": B(h) = e^h - 1; "bh1": B(h) = h
    """

    spare = 1

    def __init__(self, schedule, steps=20, *, order=2, variant="bh2", lower_order_final=True, **kwargs):
        check_choice("UniPC", "order", order, (1, 2, 3))
        check_choice("UniPC", "variant", variant, ("bh1", "bh2"))
        self.order, self.variant, self.lower_order_final = order, variant, lower_order_final
        self.history = order
        super().__init__(schedule, steps, **kwargs)

    def rows(self, grid):
        logs = [_log_snr(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
        result, order, n = [], 0, len(grid)
        for i, _, s, A, S, arguments in _points(grid):
            current = {"x": 1.0, "y": 0.0, "h1": 0.0, "h2": 0.0, "h3": 0.0}  # the corrected sample
            if i:
                gain, ratios, predictor, corrector = self._system(logs, grid.alpha, i - 1, order)
                current["y"] += gain * corrector[-1]
                current["h1"] -= gain * corrector[-1]
                for j, ratio in enumerate(ratios):
                    difference = gain * (corrector[j] - predictor[j]) / ratio
                    current[f"h{j + 2}"] += difference
                    current["h1"] -= difference
            order = min(self.order, i + 1)
            if S == 0:
                order = 1
            elif self.lower_order_final:
                order = min(order, n - i)
            while order > 1 and not math.isfinite(logs[i - order + 1]):  # pure noise has no lambda
                order -= 1
            sample = {term: S / s * c for term, c in current.items()}
            sample["y"] -= A * math.expm1(logs[i] - logs[i + 1])
            gain, ratios, predictor, _ = self._system(logs, grid.alpha, i, order)
            for j, ratio in enumerate(ratios):
                sample[f"h{j + 1}"] += gain * predictor[j] / ratio
                sample["y"] -= gain * predictor[j] / ratio
            result.append(Row(**arguments, sample={term: sample[term] for term in ("x", "y", "h1", "h2", "h3")[: 2 + self.history]}))
        return result

    def _system(self, logs, alpha, i, order):
        """(-A B(h), the ratios r, the predictor's weights, the corrector's) of the step from i."""
        h = logs[i] - logs[i + 1]  # -h of the paper: for x_0
        if h == 0 or not math.isfinite(h):  # a step that goes nowhere, or comes from pure noise: nothing to correct
            return 0.0, [], [], [0.0]
        scale = h if self.variant == "bh1" else math.expm1(h)
        ratios = [(logs[i - j] - logs[i]) / -h for j in range(1, order)]
        powers = np.array([[r**k for r in (*ratios, 1.0)] for k in range(order)])
        moments, phi, factorial = [], math.expm1(h) / h - 1, 1
        for k in range(order):
            moments.append(phi * factorial / scale)
            factorial *= k + 2
            phi = phi / h - 1 / factorial
        corrector = [0.5] if order == 1 else np.linalg.solve(powers, moments)
        predictor = [0.5] if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
        return -alpha[i + 1] * scale, ratios, predictor, corrector
