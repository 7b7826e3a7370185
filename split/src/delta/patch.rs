//! Patching: rows of the base in, rows of the final model out, in place.

use super::bits::Shape;
use super::block::with_decoder;
use super::index::{BlockKind, rows_of};
use super::low_rank::Factors;
use super::manifest::DeltaKind;
use super::open::Delta;
use crate::error::Result;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Weights from which rows are patched by all threads of the pool. One thread patches 10^9 weights a second (Zen 5, zstd
/// included), and waking the pool from outside takes 25 microseconds: below 2^15 weights two threads are slower, from 2^16
/// on faster if the second core is idle (8 against 33 microseconds for 2^13, 41 against 48 for 2^15; a layer of 126 million
/// weights takes 45 and 23 milliseconds). Twice that leaves room for a core that is not
/// (`cargo bench -p thermocline-split --bench delta -- crossover`).
pub(super) const PARALLEL_WEIGHTS_MIN: usize = 1 << 17;
/// Rows folded by one job.
const FOLD_ROWS: usize = 16;

/// Rows of one place, with their numbers there.
type Rows<'a> = Vec<(usize, &'a mut [u16])>;

/// Rows that are patched together.
enum Job<'a> {
    /// From one block of a tensor; numbers count within the block.
    Block { tensor: usize, block: usize, rows: Rows<'a> },
    /// From factors; numbers count within the matrix.
    Fold { factors: Arc<Factors>, rows: Rows<'a> },
}

impl Delta {
    /// Sets from how many weights on rows are patched by all threads of the current rayon pool; by default
    /// 131072, which was measured on two cores (ARCHITECTURE.md).
    pub fn set_parallel_from(&mut self, weights: usize) {
        self.parallel_from = weights;
    }

    /// Turns rows of a base matrix into the final model's, in place. `rows` and their order are the checkpoint's,
    /// for a down projection too (where [`Delta::patch_neurons`] is much faster); `base` is `[rows.len(), columns]`
    /// row-major bf16 bits.
    ///
    /// # Errors
    /// If the delta is damaged or has no such matrix, or the rows are outside it. Some rows may be patched by then: what
    /// is in `base` is of no more use.
    ///
    /// # Panics
    /// If `base` is not as long as the rows.
    pub fn patch_rows(&self, tensor: &str, rows: Range<usize>, base: &mut [u16]) -> Result<()> {
        let (i, entry) = self.entry(tensor)?;
        let is_down = Shape::new(tensor, &[1, 1]).is_some_and(|s| s.is_down);
        let (n_rows, columns) = if is_down { (entry.columns, entry.rows) } else { (entry.rows, entry.columns) };
        if rows.start > rows.end || rows.end > n_rows {
            return Err(self.damaged(tensor, format!("rows {rows:?} of {n_rows} were asked for")));
        }
        assert_eq!(base.len(), rows.len() * columns, "the rows' weights");
        let numbered = rows.clone().zip(base.chunks_exact_mut(columns)).collect();
        match entry.kind {
            DeltaKind::Unchanged => Ok(()),
            DeltaKind::Vector => Err(self.damaged(tensor, "is a vector, not a matrix")),
            DeltaKind::LowRank => self.run(self.fold_jobs(i, numbered, false)?),
            DeltaKind::Blocks if is_down => self.patch_down(i, rows, base),
            DeltaKind::Blocks => self.run(self.block_jobs(i, numbered)),
        }
    }

    /// Turns the base's neurons `ids` (the checkpoint's numbers) of a layer into the final model's, in place: `gate`
    /// and `up` are their rows of these matrices, `down` their *columns* of the down matrix, each `[ids.len(),
    /// hidden_size]` row-major bf16 bits, in the order of `ids`. Each block is read and decoded once, so a whole layer
    /// in any order is one pass over its part of the delta.
    ///
    /// # Errors
    /// If the delta is damaged, or there is no such layer or neuron; the slices are of no more use then.
    ///
    /// # Panics
    /// If a slice is not as long as the neurons' weights.
    pub fn patch_neurons(
        &self,
        layer: usize,
        ids: &[u32],
        gate: &mut [u16],
        up: &mut [u16],
        down: &mut [u16],
    ) -> Result<()> {
        let (hidden, ffn) = (self.manifest.config.hidden_size, self.manifest.config.intermediate_size);
        if let Some(id) = ids.iter().find(|id| **id as usize >= ffn) {
            return Err(self.damaged(&format!("layer {layer}"), format!("neuron {id} of {ffn} was asked for")));
        }
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_unstable_by_key(|at| ids[*at]);
        let mut jobs = Vec::new();
        for (part, bits) in [("gate", gate), ("up", up), ("down", down)] {
            assert_eq!(bits.len(), ids.len() * hidden, "the weights of the {part} rows");
            let (i, entry) = self.entry(&format!("model.layers.{layer}.mlp.{part}_proj.weight"))?;
            if entry.kind == DeltaKind::Unchanged {
                continue;
            }
            let mut all: Vec<_> = bits.chunks_exact_mut(hidden).map(Some).collect();
            let take = |at: &usize| all[*at].take().map(|row| (ids[*at] as usize, row));
            let rows = order.iter().filter_map(take).collect();
            jobs.extend(if entry.kind == DeltaKind::LowRank {
                self.fold_jobs(i, rows, true)?
            } else {
                self.block_jobs(i, rows)
            });
        }
        self.run(jobs)
    }

    /// Groups rows, in rising order of their stored numbers, by block; blocks without changes are left out.
    fn block_jobs<'a>(&self, tensor: usize, rows: Rows<'a>) -> Vec<Job<'a>> {
        let block_rows = self.manifest.tensors[tensor].block_rows;
        let mut jobs: Vec<Job<'a>> = Vec::new();
        for (number, row) in rows {
            let b = number / block_rows;
            if self.blocks(tensor)[b].kind == BlockKind::Unchanged {
                continue;
            }
            let local = (number - b * block_rows, row);
            match jobs.last_mut() {
                Some(Job::Block { block, rows, .. }) if *block == b => rows.push(local),
                _ => jobs.push(Job::Block { tensor, block: b, rows: vec![local] }),
            }
        }
        jobs
    }

    fn fold_jobs<'a>(&self, tensor: usize, rows: Rows<'a>, by_neuron: bool) -> Result<Vec<Job<'a>>> {
        let factors = Arc::new(self.factors(self.tensor(tensor)?, by_neuron)?);
        let (mut jobs, mut rows) = (Vec::new(), rows.into_iter().peekable());
        while rows.peek().is_some() {
            jobs.push(Job::Fold { factors: Arc::clone(&factors), rows: rows.by_ref().take(FOLD_ROWS).collect() });
        }
        Ok(jobs)
    }

    /// Does the jobs, with all threads of the pool if there is enough to do.
    fn run(&self, jobs: Vec<Job<'_>>) -> Result<()> {
        // A block is decoded whole, however few of its rows are wanted.
        let weights = |job: &Job<'_>| match job {
            Job::Block { tensor, block, .. } => {
                let entry = &self.manifest.tensors[*tensor];
                rows_of(entry, *block).len() * entry.columns
            }
            Job::Fold { factors, rows } => rows.iter().map(|(_, row)| row.len()).sum::<usize>() * (1 + factors.rank()),
        };
        if jobs.len() > 1 && jobs.iter().map(weights).sum::<usize>() >= self.parallel_from {
            jobs.into_par_iter().try_for_each(|job| self.run_one(job))
        } else {
            jobs.into_iter().try_for_each(|job| self.run_one(job))
        }
    }

    fn run_one(&self, job: Job<'_>) -> Result<()> {
        match job {
            Job::Block { tensor, block, rows } => self.patch_block(tensor, block, rows),
            Job::Fold { factors, rows } => {
                let mut acc = Vec::new();
                rows.into_iter().for_each(|(number, row)| factors.fold(number, row, &mut acc));
                Ok(())
            }
        }
    }

    fn patch_block(&self, tensor: usize, block: usize, rows: Rows<'_>) -> Result<()> {
        let (entry, place) = (self.tensor(tensor)?, &self.blocks(tensor)[block]);
        let own = rows_of(entry, block);
        with_decoder(|decoder| {
            let damaged = |reason: &str| {
                self.damaged(&entry.name, format!("block {block}, rows {}..{}: {reason}", own.start, own.end))
            };
            self.read_stored(place, decoder)?;
            let decoded = decoder.decode(place, own.len(), entry.columns, self.patcher).map_err(damaged)?;
            for (number, row) in rows {
                if !decoded.apply(self.patcher, number, row) {
                    return Err(damaged("bitmap and number of changes do not fit"));
                }
            }
            Ok(())
        })
    }

    /// Rows of a down projection as the checkpoint has them: every block of neurons is a strip of columns.
    fn patch_down(&self, tensor: usize, rows: Range<usize>, base: &mut [u16]) -> Result<()> {
        let entry = self.tensor(tensor)?;
        let (ffn, hidden) = (entry.rows, entry.columns);
        let blocks = self.blocks(tensor).iter().enumerate();
        let changed: Vec<usize> = blocks.filter(|(_, e)| e.kind != BlockKind::Unchanged).map(|(b, _)| b).collect();
        // A strip for every thread at a time: memory stays that of a few blocks.
        for batch in changed.chunks(2 * rayon::current_num_threads()) {
            let strips = batch.par_iter().map(|&b| {
                let neurons = rows_of(entry, b);
                let mut strip = vec![0u16; neurons.len() * hidden];
                for (r, row) in rows.clone().zip(base.chunks_exact(ffn)) {
                    row[neurons.clone()].iter().enumerate().for_each(|(n, bits)| strip[n * hidden + r] = *bits);
                }
                self.patch_block(tensor, b, strip.chunks_exact_mut(hidden).enumerate().collect())?;
                Ok((neurons, strip))
            });
            let strips = strips.collect::<Result<Vec<_>>>()?;
            base.par_chunks_exact_mut(ffn).zip(rows.clone()).for_each(|(row, r)| {
                for (neurons, strip) in &strips {
                    row[neurons.clone()].iter_mut().enumerate().for_each(|(n, bits)| *bits = strip[n * hidden + r]);
                }
            });
        }
        Ok(())
    }
}
