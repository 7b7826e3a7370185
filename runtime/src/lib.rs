//! Thermocline: runtime.
