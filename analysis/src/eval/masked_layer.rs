//! One layer under one mask.

use super::choosers::{Choosers, SketchedLayer};
use super::inputs::{self, InputChoice, InputMethod};
use super::rows::RowRule;
use super::{Mask, Positions};
use crate::Result;
use std::sync::atomic::{AtomicU64, Ordering};
use thermocline_calibrate::dense::{DenseLayer, Sequence};
use thermocline_runtime::quality::Tally;
use thermocline_runtime::{LayerActive, always_neurons};
use thermocline_split::Sketch;

/// A layer with what `mask` needs to know of it.
pub(crate) struct MaskedLayer<'a> {
    mask: Mask,
    layer: &'a DenseLayer,
    down_norm: &'a [f32],
    choosers: &'a Choosers,
    active: Option<&'a LayerActive>,
    /// How inputs are left out, if the mask does that.
    of_inputs: Option<InputMethod<'a>>,
    /// What is known of the neurons, and the cost from which a row is read, if the mask chooses rows.
    of_rows: Option<(Sketch, f32)>,
    /// Gate, up and down rows that were read so far, if the mask chooses rows.
    rows_read: [AtomicU64; 3],
}

impl<'a> MaskedLayer<'a> {
    /// `down_norm [intermediate_size]`; `active` is what a predicted or graded mask computes of this layer, `choice` the inputs
    /// that a mask of inputs keeps.
    pub(crate) fn new(
        mask: Mask,
        layer: &'a DenseLayer,
        down_norm: &'a [f32],
        choosers: &'a Choosers,
        active: Option<&'a LayerActive>,
        choice: Option<InputChoice<'a>>,
    ) -> Result<Self> {
        let asked = choosers.sketch.as_ref().filter(|_| mask.asks_sketch()).zip(active.and_then(LayerActive::of_rows));
        let of_rows = asked.map(|(sketch, (least, factors))| (sketch.known(factors), least));
        let of_inputs = choice.map(|choice| InputMethod::new(layer, choice)).transpose()?;
        let rows_read = Default::default();
        Ok(MaskedLayer { mask, layer, down_norm, choosers, active, of_inputs, of_rows, rows_read })
    }

    /// Inputs of each group of matrices that were kept by thresholds so far.
    pub(crate) fn kept(&self) -> [u64; 4] {
        self.of_inputs.as_ref().map_or([0; 4], InputMethod::kept)
    }

    /// Gate, up and down rows that were read so far.
    pub(crate) fn rows_read(&self) -> [u64; 3] {
        self.rows_read.each_ref().map(|n| n.load(Ordering::Relaxed))
    }

    /// Takes the rows `x [n_rows, hidden_size]` of `sequences` through the layer. The mask applies at `positions`; a threshold
    /// is always that of a sequence's own rows, of all of them.
    pub(crate) fn forward(&self, x: &mut [f32], sequences: &[Sequence], positions: Positions) -> Result<Tally> {
        if let Some(method) = &self.of_inputs {
            for (sequence, rows) in split_rows(x, sequences, self.layer.hidden_size()) {
                let next = method.forward(rows, sequence, positions.first_masked(sequence))?;
                rows.copy_from_slice(&next);
            }
            // Who leaves out inputs computes all neurons, somehow: recall says nothing of it.
            return Ok(Tally::default());
        }
        let mut next = self.layer.attention_in(x, sequences)?;
        let input = self.layer.ffn_input(&next)?;
        if let Some(((known, least), sketch)) = self.of_rows.as_ref().zip(self.sketch()) {
            let [mut h, mut sketched] = self.read_products(sketch, &input)?;
            let guessed = sketch.pre_activations(&input)?;
            self.choose_rows((sketch, known, *least), guessed, [&mut h, &mut sketched], sequences, positions);
            self.add_read(sketch, &mut next, h)?;
            sketch.add(&mut next, sketched)?;
            x.copy_from_slice(&next);
            // Of most neurons a part is computed: recall says nothing of it.
            return Ok(Tally::default());
        }
        let mut h = self.layer.neurons(&input)?.h;
        let mut sketched = Vec::new();
        let tally = self.leave_out(&input, &mut h, &mut sketched, sequences, positions)?;
        self.layer.ffn_output(&mut next, h)?;
        if let Some(sketch) = self.sketch() {
            sketch.add(&mut next, sketched)?;
        }
        self.stand_in(&mut next, sequences, positions);
        x.copy_from_slice(&next);
        Ok(tally)
    }

    /// Gate and up products with the rows that are read, of all neurons, `[n_rows, intermediate_size]`: with the residuals of those that
    /// are not always computed, if the sketch has them, else with the neurons' own.
    fn read_products(&self, sketch: &SketchedLayer, input: &[f32]) -> Result<[Vec<f32>; 2]> {
        let Some(residual) = sketch.with_residuals() else { return Ok(self.layer.pre_activations(input)?) };
        let mut products = residual.pre_activations(input)?;
        if self.n_always() > 0 {
            for (products, own) in products.iter_mut().zip(self.layer.pre_activations(input)?) {
                self.where_always(sketch, products, |i, product| *product = own[i]);
            }
        }
        Ok(products)
    }

    /// Adds `h [n_rows, intermediate_size]` times the down rows that are read to `x`.
    fn add_read(&self, sketch: &SketchedLayer, x: &mut [f32], mut h: Vec<f32>) -> Result<()> {
        let Some(residual) = sketch.with_residuals() else { return Ok(self.layer.ffn_output(x, h)?) };
        if self.n_always() > 0 {
            let mut own = vec![0.0; h.len()];
            self.where_always(sketch, &mut h, |i, h| own[i] = std::mem::take(h));
            self.layer.ffn_output(x, own)?;
        }
        Ok(residual.output(x, h)?)
    }

    /// Shows `see` those of `values [n_rows, intermediate_size]` that are of neurons which every token computes.
    fn where_always(&self, sketch: &SketchedLayer, values: &mut [f32], mut see: impl FnMut(usize, &mut f32)) {
        let (n, places) = (self.n_always(), sketch.places());
        let always =
            values.iter_mut().enumerate().zip(places.iter().cycle()).filter(|(_, place)| (**place as usize) < n);
        always.for_each(|((i, value), _)| see(i, value));
    }

    /// The first neurons of the split's order that every token computes.
    fn n_always(&self) -> usize {
        always_neurons(self.mask.always() as f32, self.layer.intermediate_size())
    }

    /// The sketch, if the mask asks it.
    fn sketch(&self) -> Option<&SketchedLayer> {
        self.choosers.sketch.as_ref().filter(|_| self.mask.asks_sketch())
    }

    /// From gate and up products, by the sketch and by the rows, to activations for the neurons' own down rows and for the sketch's, all
    /// `[n_rows, intermediate_size]`.
    fn choose_rows(
        &self,
        (sketch, known, least): (&SketchedLayer, &Sketch, f32),
        [gate, up]: [Vec<f32>; 2],
        [own, sketched]: [&mut [f32]; 2],
        sequences: &[Sequence],
        positions: Positions,
    ) {
        let (ffn, activation) = (self.layer.intermediate_size(), sketch.activation());
        let n_always = self.n_always();
        let (whole, places) = (sketch.is_whole(), sketch.places());
        let rule = RowRule { sketch: known, activation, least, whole, places, n_always };
        let mut first = 0;
        for ((sequence, own), (_, sketched)) in
            split_rows(own, sequences, ffn).zip(split_rows(sketched, sequences, ffn))
        {
            let from = positions.first_masked(sequence);
            let masked = (first + from) * ffn..(first + sequence.n_rows()) * ffn;
            let ((dense, own), (dense_up, sketched)) =
                (own.split_at_mut(from * ffn), sketched.split_at_mut(from * ffn));
            dense.iter_mut().zip(&*dense_up).for_each(|(gate, up)| *gate = activation.apply(*gate, *up));
            dense_up.fill(0.0);
            let read = rule.apply([&gate[masked.clone()], &up[masked]], [own, sketched]);
            self.rows_read.iter().zip(read).for_each(|(sum, n)| _ = sum.fetch_add(n, Ordering::Relaxed));
            first += sequence.n_rows();
        }
    }

    /// Sets to zero what the mask leaves out of `h [n_rows, intermediate_size]`; what its sketch gives instead is put in
    /// `sketched`, of the same shape.
    fn leave_out(
        &self,
        input: &[f32],
        h: &mut [f32],
        sketched: &mut Vec<f32>,
        sequences: &[Sequence],
        positions: Positions,
    ) -> Result<Tally> {
        let ffn = self.layer.intermediate_size();
        if self.mask == Mask::Dense {
            return Ok(Tally::whole(h.len() / ffn, ffn));
        }
        let scores = self.scores(input, sketched, sequences)?;
        let (mut tally, mut first) = (Tally::default(), 0);
        for (sequence, h) in split_rows(h, sequences, ffn) {
            let from = positions.first_masked(sequence);
            let scores = scores.as_ref().map(|s| &s[(first + from) * ffn..(first + sequence.n_rows()) * ffn]);
            let mut sketched: &mut [f32] = sketched;
            if !sketched.is_empty() {
                let rows = &mut sketched[first * ffn..(first + sequence.n_rows()) * ffn];
                let (whole, masked) = rows.split_at_mut(from * ffn);
                whole.fill(0.0);
                sketched = masked;
            }
            tally = tally + self.mask.apply(&mut h[from * ffn..], sketched, self.down_norm, scores, self.active);
            first += sequence.n_rows();
        }
        Ok(tally)
    }

    /// What neurons are chosen by, `[n_rows, intermediate_size]`, where it is not their own activation; a sketch's activations
    /// into `sketched`.
    fn scores(&self, input: &[f32], sketched: &mut Vec<f32>, sequences: &[Sequence]) -> Result<Option<Vec<f32>>> {
        if let Some(sketch) = self.sketch() {
            let look = sketch.look(input, self.n_always())?;
            *sketched = look.h;
            return Ok(Some(look.scores));
        }
        match (self.mask, &self.choosers.predictor) {
            (Mask::Cats(share), _) => {
                let mut gates = self.layer.gates(input)?;
                for (_, gates) in split_rows(&mut gates, sequences, self.layer.intermediate_size()) {
                    inputs::above_threshold(gates, share, 0);
                }
                Ok(Some(gates))
            }
            (mask, Some((low_rank, norms))) if mask.asks_predictor() => {
                Ok(Some(low_rank.scores(input, self.layer.activation(), norms)?))
            }
            _ => Ok(None),
        }
    }

    /// Adds what stands for the neurons that were left out.
    fn stand_in(&self, x: &mut [f32], sequences: &[Sequence], positions: Positions) {
        let Some(mean) = self.active.map(|a| &a.left_out).filter(|mean| !mean.is_empty()) else { return };
        for (sequence, rows) in split_rows(x, sequences, mean.len()) {
            let masked = rows.chunks_exact_mut(mean.len()).skip(positions.first_masked(sequence));
            masked.for_each(|x| x.iter_mut().zip(mean).for_each(|(x, mean)| *x += mean));
        }
    }
}

/// The values of each sequence's rows, `width` a row.
fn split_rows<'a, 'b>(
    mut values: &'a mut [f32],
    sequences: &'b [Sequence],
    width: usize,
) -> impl Iterator<Item = (&'b Sequence, &'a mut [f32])> {
    sequences.iter().map(move |sequence| {
        let (rows, rest) = std::mem::take(&mut values).split_at_mut(sequence.n_rows() * width);
        values = rest;
        (sequence, rows)
    })
}
