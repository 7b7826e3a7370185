use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use thermocline_kernels::Encoding;

/// The encoding of each layer's neurons: one for all, but for ranges of layers that have their own.
///
/// As text: the one for all, then `FIRST-LAST=ENCODING` or `LAYER=ENCODING`, between commas, of which later ones count:
/// `q4,0-3=bf16x`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEncodings {
    all: Encoding,
    others: Vec<(RangeInclusive<usize>, Encoding)>,
}

impl LayerEncodings {
    /// Of layer `l`.
    pub fn of(&self, l: usize) -> Encoding {
        self.others.iter().rev().find(|(layers, _)| layers.contains(&l)).map_or(self.all, |(_, encoding)| *encoding)
    }

    /// Of layers `0..n`.
    pub fn of_layers(&self, n: usize) -> impl Iterator<Item = Encoding> + '_ {
        (0..n).map(|l| self.of(l))
    }

    /// That of all layers without one of their own.
    pub fn common(&self) -> Encoding {
        self.all
    }

    /// The last layer that has its own.
    pub(crate) fn last_named(&self) -> Option<usize> {
        self.others.iter().map(|(layers, _)| *layers.end()).max()
    }
}

impl From<Encoding> for LayerEncodings {
    fn from(all: Encoding) -> Self {
        Self { all, others: Vec::new() }
    }
}

impl fmt::Display for LayerEncodings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.all.fmt(f)?;
        for (layers, encoding) in &self.others {
            match layers.start() == layers.end() {
                true => write!(f, ",{}={encoding}", layers.start())?,
                false => write!(f, ",{}-{}={encoding}", layers.start(), layers.end())?,
            }
        }
        Ok(())
    }
}

impl FromStr for LayerEncodings {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split(',');
        let all = stored(parts.next().unwrap_or_default())?;
        let others = parts.map(|part| {
            let bad = || format!("{part:?} is not FIRST-LAST=ENCODING or LAYER=ENCODING");
            let (layers, encoding) = part.split_once('=').ok_or_else(bad)?;
            let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
            let range = first.parse().map_err(|_| bad())?..=last.parse().map_err(|_| bad())?;
            if range.is_empty() {
                return Err(bad());
            }
            Ok((range, stored(encoding)?))
        });
        let others = others.collect::<Result<_, _>>()?;
        Ok(Self { all, others })
    }
}

/// An encoding that files can have.
fn stored(name: &str) -> Result<Encoding, String> {
    let storable = || Encoding::ALL.into_iter().filter(|e| *e != Encoding::Q4Plus);
    let names = || storable().map(Encoding::name).collect::<Vec<_>>().join(", ");
    storable()
        .find(|e| e.name() == name)
        .ok_or_else(|| format!("unknown encoding {name:?}; expected one of {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_have_their_encodings() {
        let e: LayerEncodings = "q4+exact,0-3=bf16x,2=q8".parse().expect("a list");
        assert_eq!([0, 2, 3, 4].map(|l| e.of(l).name()), ["bf16x", "q8", "bf16x", "q4+exact"]);
        assert_eq!((e.to_string().as_str(), e.last_named()), ("q4+exact,0-3=bf16x,2=q8", Some(3)));
        for bad in ["", "q5", "q4+plus", "q4,", "q4,3-1=q8", "q4,x=q8", "q4,1=q5", "q4,1"] {
            assert!(bad.parse::<LayerEncodings>().is_err(), "{bad}");
        }
    }
}
