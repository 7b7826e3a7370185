//! The tensor types of GGUF: their numbers in the file, and how many bytes a block of how many elements takes.

use crate::SourceDtype;

/// A tensor type that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each variant is named after its type")]
#[allow(non_camel_case_types, reason = "these are the format's own names")]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
}

/// Type, number in the file, elements in a block, bytes in a block, name.
const TYPES: [(GgmlType, u32, usize, usize, &str); 14] = [
    (GgmlType::F32, 0, 1, 4, "F32"),
    (GgmlType::F16, 1, 1, 2, "F16"),
    (GgmlType::Q4_0, 2, 32, 18, "Q4_0"),
    (GgmlType::Q4_1, 3, 32, 20, "Q4_1"),
    (GgmlType::Q5_0, 6, 32, 22, "Q5_0"),
    (GgmlType::Q5_1, 7, 32, 24, "Q5_1"),
    (GgmlType::Q8_0, 8, 32, 34, "Q8_0"),
    (GgmlType::Q2_K, 10, 256, 84, "Q2_K"),
    (GgmlType::Q3_K, 11, 256, 110, "Q3_K"),
    (GgmlType::Q4_K, 12, 256, 144, "Q4_K"),
    (GgmlType::Q5_K, 13, 256, 176, "Q5_K"),
    (GgmlType::Q6_K, 14, 256, 210, "Q6_K"),
    (GgmlType::Q8_K, 15, 256, 292, "Q8_K"),
    (GgmlType::BF16, 30, 1, 2, "BF16"),
];

/// Names of the types that exist but are not read here, for the message that refuses them.
const FOREIGN: [(u32, &str); 14] = [
    (9, "Q8_1"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl GgmlType {
    /// Every type.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        TYPES.iter().map(|row| row.0)
    }

    /// The type of a number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The name of a known but unsupported type.
    pub fn foreign_name(id: u32) -> Option<&'static str> {
        FOREIGN.iter().find(|row| row.0 == id).map(|row| row.1)
    }

    fn row(self) -> (u32, usize, usize, &'static str) {
        // The table holds every variant (a test counts them), so the fallback is never taken.
        TYPES.iter().find(|row| row.0 == self).map_or((0, 1, 4, "F32"), |row| (row.1, row.2, row.3, row.4))
    }

    /// Its number in a file.
    pub fn id(self) -> u32 {
        self.row().0
    }

    /// Elements in a block.
    pub fn block_len(self) -> usize {
        self.row().1
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        self.row().2
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().3
    }

    /// What the [`crate::Checkpoint`] trait calls it.
    pub fn source_dtype(self) -> SourceDtype {
        match self {
            GgmlType::F32 => SourceDtype::F32,
            GgmlType::F16 => SourceDtype::F16,
            GgmlType::BF16 => SourceDtype::Bf16,
            other => SourceDtype::Quantized(other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_in_the_table_once() {
        for kind in GgmlType::all() {
            assert_eq!(TYPES.iter().filter(|row| row.0 == kind).count(), 1);
            assert_eq!(GgmlType::from_id(kind.id()), Some(kind));
        }
        // A variant that is missing in the table would be taken for F32.
        assert_eq!(GgmlType::Q8_K as usize + 1, TYPES.len());
    }
}
