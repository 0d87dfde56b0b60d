"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.flow._affine_coupling import affine_coupling
from genkern.ops.flow._rational_quadratic_spline import rational_quadratic_spline
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = ["affine_coupling", "gaussian_kl", "rational_quadratic_spline", "reparameterize", "reparameterize_kl"]
