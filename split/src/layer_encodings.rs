use crate::precision::first_chunks;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use thermocline_kernels::Encoding;

/// The encoding of each layer's neurons: one for all, but for layers, and hot neurons, that have their own.
///
/// As text: the one for all, then `WHERE=ENCODING` between commas, of which later ones count. `WHERE` is layers (`0-3`, `7`),
/// hot neurons (`hot@0.2`: this share of each layer's, the first ones in split order, in whole chunks), or the hot neurons of
/// layers: `q4,0-3=bf16x,hot@0.2=q8,30-31:hot@0.5=bf16`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerEncodings {
    all: Encoding,
    others: Vec<Rule>,
}

/// Neurons that have an encoding of their own.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    /// `None`: of all layers.
    layers: Option<RangeInclusive<usize>>,
    /// The hot neurons that it is for; `None`: all.
    hot: Option<f64>,
    encoding: Encoding,
}

impl LayerEncodings {
    /// The sections of layer `l` with `n` neurons, hottest first: how many neurons, and their encoding. Neighbours differ.
    pub fn sections(&self, l: usize, n: usize, chunk_neurons: usize) -> Vec<(usize, Encoding)> {
        let rules = self.others.iter().filter(|r| r.layers.as_ref().is_none_or(|layers| layers.contains(&l)));
        let end = |rule: &Rule| rule.hot.map_or(n, |share| first_chunks(share, n, chunk_neurons));
        let rules: Vec<(usize, Encoding)> =
            [(n, self.all)].into_iter().chain(rules.map(|r| (end(r), r.encoding))).collect();
        let mut ends: Vec<usize> = rules.iter().map(|(end, _)| *end).collect();
        ends.sort_unstable();
        let (mut sections, mut first): (Vec<(usize, Encoding)>, usize) = (Vec::new(), 0);
        for end in ends.into_iter().filter(|end| *end > 0) {
            let last = rules.iter().rev().find(|(e, _)| *e >= end);
            let encoding = last.map_or(self.all, |(_, encoding)| *encoding);
            match sections.last_mut() {
                Some((neurons, before)) if *before == encoding => *neurons += end - first,
                _ if end > first => sections.push((end - first, encoding)),
                _ => {}
            }
            first = end;
        }
        sections
    }

    /// Every encoding that it names.
    pub fn all(&self) -> impl Iterator<Item = Encoding> + '_ {
        [self.all].into_iter().chain(self.others.iter().map(|r| r.encoding))
    }

    /// That of all neurons without one of their own.
    pub fn common(&self) -> Encoding {
        self.all
    }

    /// The last layer that is named.
    pub(crate) fn last_named(&self) -> Option<usize> {
        self.others.iter().filter_map(|r| r.layers.as_ref().map(|layers| *layers.end())).max()
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
        for Rule { layers, hot, encoding } in &self.others {
            f.write_str(",")?;
            match layers {
                Some(layers) if layers.start() == layers.end() => write!(f, "{}", layers.start())?,
                Some(layers) => write!(f, "{}-{}", layers.start(), layers.end())?,
                None => {}
            }
            if let Some(share) = hot {
                write!(f, "{}hot@{share}", if layers.is_some() { ":" } else { "" })?;
            }
            write!(f, "={encoding}")?;
        }
        Ok(())
    }
}

impl FromStr for LayerEncodings {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split(',');
        let all = stored(parts.next().unwrap_or_default())?;
        let others = parts.map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self { all, others })
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(part: &str) -> Result<Self, String> {
        let bad = || format!("{part:?} is not WHERE=ENCODING with WHERE as in 0-3, 7, hot@0.2 or 0-3:hot@0.2");
        let (place, encoding) = part.split_once('=').ok_or_else(bad)?;
        let (layers, hot) = match place.split_once("hot@") {
            None => (Some(place), None),
            Some(("", share)) => (None, Some(share)),
            Some((layers, share)) => (Some(layers.strip_suffix(':').ok_or_else(bad)?), Some(share)),
        };
        let range = |layers: &str| {
            let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
            let range = first.parse().map_err(|_| bad())?..=last.parse().map_err(|_| bad())?;
            if range.is_empty() { Err(bad()) } else { Ok(range) }
        };
        let share = |share: &str| match share.parse() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
            _ => Err(format!("{part:?}: the share after @ is above 0 and at most 1")),
        };
        let (layers, hot) = (layers.map(range).transpose()?, hot.map(share).transpose()?);
        Ok(Self { layers, hot, encoding: stored(encoding)? })
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

    fn sections(text: &str, layer: usize) -> Vec<(usize, &'static str)> {
        let e: LayerEncodings = text.parse().expect("a list");
        assert_eq!(e.to_string(), text);
        e.sections(layer, 100, 8).into_iter().map(|(n, encoding)| (n, encoding.name())).collect()
    }

    #[test]
    fn layers_have_their_encodings() {
        let text = "q4+exact,0-3=bf16x,2=q8";
        let whole = |l| sections(text, l);
        assert_eq!([0, 2, 3, 4].map(whole), ["bf16x", "q8", "bf16x", "q4+exact"].map(|name| vec![(100, name)]));
        assert_eq!(text.parse::<LayerEncodings>().map(|e| e.last_named()), Ok(Some(3)));
    }

    #[test]
    fn hot_neurons_have_theirs_and_later_rules_count() {
        assert_eq!(sections("q4,hot@0.2=q8", 5), [(24, "q8"), (76, "q4")]);
        // What is named for a layer covers its hot neurons, and the other way round.
        assert_eq!(sections("q4,hot@0.2=q8,0-3=bf16x", 3), [(100, "bf16x")]);
        assert_eq!(sections("q4,0-3=bf16x,hot@0.2=q8", 3), [(24, "q8"), (76, "bf16x")]);
        let two = "q4,2-3:hot@0.5=q8,3:hot@0.08=bf16";
        assert_eq!(sections(two, 1), [(100, "q4")]);
        assert_eq!(sections(two, 2), [(56, "q8"), (44, "q4")]);
        assert_eq!(sections(two, 3), [(8, "bf16"), (48, "q8"), (44, "q4")]);
        assert_eq!(sections("q4,hot@0.08=bf16,hot@0.5=q8", 0), [(56, "q8"), (44, "q4")]);
        // Whole chunks are all, one is not none, and what is the same is no section.
        assert_eq!(sections("q4,hot@0.99=q8", 0), [(100, "q8")]);
        assert_eq!(sections("q4,hot@1=q8", 0), [(100, "q8")]);
        assert_eq!(sections("q4,hot@0.0001=q8", 0), [(8, "q8"), (92, "q4")]);
        assert_eq!(sections("q4,hot@0.2=q4", 0), [(100, "q4")]);
        assert_eq!(sections("q4,hot@0.5=q8,hot@0.2=q4", 0), [(24, "q4"), (32, "q8"), (44, "q4")]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for bad in [
            "",
            "q5",
            "q4+plus",
            "q4,",
            "q4,3-1=q8",
            "q4,x=q8",
            "q4,1=q5",
            "q4,1",
            "q4,hot@0=q8",
            "q4,hot@1.5=q8",
            "q4,hot@-1=q8",
            "q4,hot@nan=q8",
            "q4,hot@=q8",
            "q4,hot=q8",
            "q4,hot@0.5",
            "q4,0-3hot@0.5=q8",
            "q4,:hot@0.5=q8",
            "q4,0:hot@0.5=q4+plus",
            "hot@0.5=q8",
            "q4,1:=q8",
        ] {
            assert!(bad.parse::<LayerEncodings>().is_err(), "{bad}");
        }
    }
}
