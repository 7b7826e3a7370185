use crate::GROUP;

/// Groups whose digits lie together: one vector of their bytes.
pub(crate) const BLOCK: usize = 4;
/// Groups whose steps lie together: one vector of f32, as of a row's scales.
pub(crate) const STEPS: usize = 16;

/// The input of a layer, as the rows of its neurons are multiplied with it: made once by
/// [`Kernels::prepare`](crate::Kernels::prepare), used for all of them.
///
/// Where rows are q4 and the CPU has AVX-512 VNNI, products are those of integers. Within each group of 32 columns
/// `x_j` is then taken as `t q_j`: `t` is a power of two, and `q_j` is the nearest integer, of at most 24 bits with its
/// sign. With `m` the largest magnitude of the group, `|x_j - t q_j|` is at most `max(1.004 * 2^-23 m, 2^-101)`: all
/// that the input loses. `q_j` is three signed digits of 8 bits, each is multiplied with the codes, and the sums of a
/// group's products are exact; a lane sees eight columns, so that `|sum of c_j q_j| <= 8 * 8 * 2^23` for the codes
/// `c_j` from -8 to 7. Powers of two leave the product of `t` and a row's scale exact as well. What is rounded is the
/// conversion of a sum to f32, and one fused addition for every fourth group and lane:
///
/// ```text
/// |dot - sum w_j x_j|  <=  sum |w_j| max(1.004 * 2^-23 m, 2^-101)  +  (groups / 4 + 6) 2^-24 sum |w_j t q_j|
/// ```
///
/// The loop over f32 products has `(groups / 2 + 7) 2^-24 sum |w_j x_j|` instead. An input with an infinity or a NaN is
/// multiplied by that loop.
#[derive(Debug, Clone, Default)]
pub struct PreparedInput {
    pub(crate) values: Vec<f32>,
    pub(crate) fixed: FixedPoint,
    /// Whether `fixed` is about `values`; only ever set where the CPU has AVX-512 VNNI.
    pub(crate) is_fixed: bool,
}

/// An input in steps of each group.
#[derive(Debug, Clone, Default)]
pub(crate) struct FixedPoint {
    pub(crate) blocks: Vec<FixedBlock>,
    /// One step of each group; anything finite for groups that there are not.
    pub(crate) steps: Vec<[f32; STEPS]>,
}

/// Four groups. Those that the last block lacks are zeros.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct FixedBlock {
    /// The lowest digit first; of each first what meets the codes' lower halves, as these lie: columns 0 to 15 of the
    /// four groups, then columns 16 to 31.
    pub(crate) digits: [[[i8; BLOCK * GROUP / 2]; 2]; 3],
    /// -8 times the sum of each lane's eight columns: codes are stored 8 too large.
    pub(crate) offsets: [i32; 16],
}

impl FixedBlock {
    pub(crate) const ZERO: Self = Self { digits: [[[0; BLOCK * GROUP / 2]; 2]; 3], offsets: [0; 16] };
}

impl PreparedInput {
    /// Memory for an input of `columns`.
    pub fn bytes(columns: usize) -> u64 {
        let groups = columns.div_ceil(GROUP);
        (4 * columns + groups.div_ceil(BLOCK) * size_of::<FixedBlock>() + 4 * groups.next_multiple_of(STEPS)) as u64
    }

    /// The input itself.
    #[inline]
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}
