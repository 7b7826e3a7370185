//! Thermocline: calibrate.
