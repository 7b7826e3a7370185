//! Thermocline: split.
