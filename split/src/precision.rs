use crate::planes::Plane;
use std::fmt;
use std::str::FromStr;

/// Up to which plane the weights of a split are used. Where a split has only one, the three are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The base: what has to be read at least.
    Base,
    /// With the coarse planes.
    Plus,
    /// With the final planes: the checkpoint's bits, if the base has these planes over it.
    Exact,
}

impl Precision {
    /// All, fewest bytes first.
    pub const ALL: [Precision; 3] = [Precision::Base, Precision::Plus, Precision::Exact];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Base => "base",
            Precision::Plus => "plus",
            Precision::Exact => "exact",
        }
    }

    /// Whether a plane over the base is used.
    pub(crate) fn takes(self, plane: Plane) -> bool {
        match plane {
            Plane::Coarse => self >= Precision::Plus,
            Plane::Final => self >= Precision::Exact,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|p| p.name() == s);
        found.ok_or_else(|| {
            format!("unknown precision {s:?}; expected base, plus or exact, or plus@SHARE or exact@SHARE")
        })
    }
}

/// Which planes of a split are used, and of which weights: of all, or of a share of each layer's neurons, the first ones in
/// split order. All other weights, those of embedding, attention and head among them, are then the base's.
///
/// As text: `plus`, or `plus@0.1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Planes {
    precision: Precision,
    share: f64,
}

impl Planes {
    /// The planes up to `precision` of this share of each layer's neurons; `None` if it is not 0 to 1.
    pub fn of_share(precision: Precision, share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then_some(Self { precision, share })
    }

    /// Up to which plane.
    pub fn precision(self) -> Precision {
        self.precision
    }

    /// Of how many of each layer's neurons: 0 to 1.
    pub fn share(self) -> f64 {
        self.share
    }

    /// Whether all weights have them.
    pub fn is_whole(self) -> bool {
        self.share >= 1.0
    }

    /// What embedding, attention and head are used with.
    pub fn of_matrices(self) -> Precision {
        if self.is_whole() { self.precision } else { Precision::Base }
    }

    /// How many of a layer's `n` neurons have the further planes, in whole chunks.
    pub(crate) fn n_front(self, n: usize, chunk_neurons: usize) -> usize {
        if self.precision == Precision::Base { 0 } else { first_chunks(self.share, n, chunk_neurons) }
    }
}

/// The first neurons of `n` that are this share of them, rounded up to whole chunks.
pub(crate) fn first_chunks(share: f64, n: usize, chunk_neurons: usize) -> usize {
    // A product that is a whole number but for its rounding is that number.
    let neurons = (share * n as f64 - 1e-6).ceil() as usize;
    neurons.div_ceil(chunk_neurons.max(1)).saturating_mul(chunk_neurons.max(1)).min(n)
}

impl From<Precision> for Planes {
    fn from(precision: Precision) -> Self {
        Self { precision, share: 1.0 }
    }
}

impl fmt::Display for Planes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.precision.fmt(f)?;
        if self.is_whole() { Ok(()) } else { write!(f, "@{}", self.share) }
    }
}

impl FromStr for Planes {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let Some((precision, share)) = s.split_once('@') else { return Ok(s.parse::<Precision>()?.into()) };
        let precision = precision.parse()?;
        let planes = share.parse().ok().and_then(|share| Self::of_share(precision, share));
        planes.ok_or_else(|| format!("{s:?}: the share after @ is 0 to 1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_chunks() {
        let n_front = |planes: &str, n, chunk| planes.parse::<Planes>().map(|p| p.n_front(n, chunk));
        for (planes, n, chunk, front) in [
            ("plus", 192, 16, 192),
            ("plus@1", 192, 16, 192),
            ("plus@0", 192, 16, 0),
            ("base", 192, 16, 0),
            // What is nearly a whole number of neurons is one.
            ("exact@0.1", 1600, 16, 160),
            ("exact@0.1", 1536, 32, 160),
            ("plus@0.01", 1536, 32, 32),
            ("plus@0.001", 192, 16, 16),
            ("plus@0.99", 100, 32, 100),
            ("plus@0.5", 100, 100, 100),
        ] {
            assert_eq!(n_front(planes, n, chunk), Ok(front), "{planes} of {n}");
        }
        for bad in ["", "half", "plus@", "plus@1.1", "plus@-0.1", "plus@nan", "most@0.1", "@0.1", "plus@0.1@0.2"] {
            assert!(bad.parse::<Planes>().is_err(), "{bad}");
        }
        assert_eq!("exact@0.25".parse::<Planes>().map(|p| p.to_string()), Ok("exact@0.25".to_owned()));
        assert_eq!("plus@1".parse::<Planes>(), Ok(Precision::Plus.into()));
    }
}
