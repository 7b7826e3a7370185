//! Numbers of a file, refused where no measurement gives them.

use serde::de::{Deserialize, Deserializer, Error, Unexpected};

/// No speed, size or count is larger, in whatever unit.
const AMOUNT_MAX: f64 = 1e18;

fn within<E: Error>(value: f64, max: f64, wanted: &str) -> Result<f64, E> {
    if (0.0..=max).contains(&value) { Ok(value) } else { Err(E::invalid_value(Unexpected::Float(value), &wanted)) }
}

fn an_amount<E: Error>(value: f64) -> Result<f64, E> {
    within(value, AMOUNT_MAX, "an amount, not negative and not absurdly large")
}

fn a_share<E: Error>(value: f64) -> Result<f64, E> {
    within(value, 1.0, "a share from 0 to 1")
}

/// A speed, a time, a ratio.
pub(super) fn amount<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    an_amount(f64::deserialize(from)?)
}

/// Several.
pub(super) fn amounts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    Vec::<f64>::deserialize(from)?.into_iter().map(an_amount).collect()
}

/// One that may be missing or `null`, which is how NaN and infinity are written.
pub(super) fn amount_or_none<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    Option::<f64>::deserialize(from)?.map(an_amount).transpose()
}

/// From 0 to 1.
pub(super) fn share<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    a_share(f64::deserialize(from)?)
}

/// A share that may be missing or `null`.
pub(super) fn share_or_none<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    Option::<f64>::deserialize(from)?.map(a_share).transpose()
}
