//! Thermocline: kernels.
