use serde::{Deserialize, Serialize};
use thermocline_kernels::SketchBits;

/// How many bits a model's sketches have. SiLU leaves little of a gate's error where the gate is negative, so that the up row's
/// counts more than the gate's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "[u8; 3]", into = "[u8; 3]")]
pub enum SketchForm {
    /// Two bits of gate and down rows, three of up rows: with scales about 2.5 a weight.
    #[default]
    UpInThree,
    /// Two bits of all rows: about 2.1.
    AllInTwo,
}

impl SketchForm {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Bits of gate, up and down rows.
    pub fn bits(self) -> [SketchBits; 3] {
        let up = match self {
            SketchForm::UpInThree => SketchBits::Three,
            SketchForm::AllInTwo => SketchBits::Two,
        };
        [SketchBits::Two, up, SketchBits::Two]
    }

    /// Bytes of a gate, an up and a down row.
    ///
    /// # Panics
    /// If `hidden_size` is zero or not a multiple of [`thermocline_kernels::SKETCH_UNIT`].
    pub fn row_bytes(self, hidden_size: usize) -> [usize; 3] {
        self.bits().map(|bits| bits.row_bytes(hidden_size))
    }

    /// Bytes of the sketch of so many neurons of a layer: three rows and four numbers of each, and the channels of the columns.
    ///
    /// # Panics
    /// As [`SketchForm::row_bytes`].
    pub fn bytes(self, n_neurons: usize, hidden_size: usize) -> usize {
        let rows: usize = self.row_bytes(hidden_size).iter().sum();
        n_neurons * (rows + 4 * size_of::<f32>()) + hidden_size * size_of::<u32>()
    }
}

impl TryFrom<[u8; 3]> for SketchForm {
    type Error = String;

    fn try_from(bits: [u8; 3]) -> Result<Self, String> {
        let forms = [SketchForm::UpInThree, SketchForm::AllInTwo];
        let found = forms.into_iter().find(|form| <[u8; 3]>::from(*form) == bits);
        found.ok_or_else(|| {
            format!("sketches of {bits:?} bits, which this program does not read; it reads [2,3,2] and [2,2,2]")
        })
    }
}

impl From<SketchForm> for [u8; 3] {
    fn from(form: SketchForm) -> Self {
        form.bits().map(|bits| bits.bits() as u8)
    }
}
