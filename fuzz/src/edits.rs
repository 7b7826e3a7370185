//! Inputs as a list of decisions.

use serde_json::{Value, json};

/// Bytes taken one after another; zeros behind the end.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether anything is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.u32() as usize % n
    }

    /// Whatever is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        let (now, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        let mut out = now.to_vec();
        out.resize(n, 0);
        out
    }

    /// A number as an enemy would write it.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 12] =
            [0, 1, 2, 31, 33, 4096, 1 << 20, u32::MAX as u64, 1 << 40, i64::MAX as u64, u64::MAX - 1, u64::MAX];
        match self.byte() {
            kind @ 0..=199 => EDGES[kind as usize % EDGES.len()],
            _ => u64::from(self.u32()),
        }
    }
}

/// Changes one leaf, or one list, of a JSON value.
pub fn edit_json(value: &mut Value, input: &mut Input<'_>) {
    let n = count(value);
    let (mut at, new) = (input.below(n), input.byte());
    let Some(place) = nth(value, &mut at) else { return };
    match (new % 8, &mut *place) {
        (0, Value::Array(items)) => drop(items.pop()),
        (1, Value::Array(items)) => {
            let last = items.last().cloned();
            items.extend(last);
        }
        (2, Value::Array(items)) if items.len() > 1 => items.swap(0, 1),
        (_, Value::String(text)) => {
            let names =
                ["", "..", "layers/001.thm", "q8", "q4+exact", "bf16", "bf16x", "q4,0=q8", "f32", "u8", "final"];
            *text = names[input.below(names.len())].to_owned();
        }
        (3, _) => *place = Value::Null,
        (4, _) => *place = json!(-(input.u32() as i64)),
        (5, _) => *place = json!(f64::from(input.u32()) * 1e30),
        _ => *place = json!(input.number()),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

fn nth<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|v| nth(v, at)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, at)),
        _ => None,
    }
}
