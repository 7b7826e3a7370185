use crate::planes::Plane;
use std::fmt;
use std::str::FromStr;

/// Which planes of a split are used. Where a split has only one, the three are the same.
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
        found.ok_or_else(|| format!("unknown precision {s:?}; expected base, plus or exact"))
    }
}
