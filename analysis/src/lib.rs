//! Thermocline: analysis.
