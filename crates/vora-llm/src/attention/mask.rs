//! One additive mask for a whole batch, from what each of its places belongs to.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};
use vora_text::{Span, Spans};

use super::mode::VisionAttention;

/// The document of what all documents of a row begin with.
const ALL: i64 = -1;
/// The document of padding.
const PADDING: i64 = -2;

/// What each place of the batch, `[batch, seq]` flattened, belongs to; -1 stands for none.
#[derive(Debug)]
pub(super) struct Tokens {
    shape: [i64; 2],
    pub(super) positions: Vec<i64>,
    documents: Vec<i64>, // ALL, or PADDING
    branches: Vec<i64>,  // -1: the trunk
    images: Vec<i64>,    // the span that the block of a bidirectional image begins with; -1: not within one
}

impl Tokens {
    pub(super) fn of(spans: &Spans, mode: VisionAttention) -> Self {
        let (batch, seq) = (spans.batch(), spans.seq());
        let size = (batch * seq) as usize;
        let mut tokens = Self {
            shape: [batch, seq],
            positions: Vec::with_capacity(size),
            documents: Vec::with_capacity(size),
            branches: Vec::with_capacity(size),
            images: Vec::with_capacity(size),
        };
        for (row_idx, row) in spans.rows().iter().enumerate() {
            let mut ends: HashMap<(Option<i64>, Option<i64>), i64> = HashMap::new(); // by the way they lie on, as below
            let mut last_images: HashMap<(Option<i64>, Option<i64>), i64> = HashMap::new();
            for (span_idx, span) in row.iter().enumerate() {
                let trunks = [(span.document(), None), (None, None)];
                let trunk_end = trunks.iter().find_map(|way| ends.get(way)).copied().unwrap_or(0);
                let end = ends.entry((span.document(), span.branch())).or_insert(trunk_end);
                tokens.positions.extend(*end..*end + span.len());
                *end += span.len();
                let image = if span.is_image() && mode.is_bidirectional() { span_idx as i64 } else { -1 };
                // An image on a branch stays apart from the trunk's, which attends to no branch.
                let before = last_images.insert((span.document(), span.branch()), image).unwrap_or(-1);
                let fuses = mode == VisionAttention::BidirectionalFused && image >= 0 && before >= 0;
                let image = if fuses { before } else { image };
                last_images.insert((span.document(), span.branch()), image);
                tokens.fill(span, image);
            }
            let row_end = (row_idx + 1) * seq as usize;
            tokens.positions.resize(row_end, 0);
            tokens.documents.resize(row_end, PADDING);
            tokens.branches.resize(row_end, -1);
            tokens.images.resize(row_end, -1);
        }
        tokens
    }

    fn fill(&mut self, span: &Span, image: i64) {
        let end = self.documents.len() + span.len() as usize;
        self.documents.resize(end, span.document().unwrap_or(ALL));
        self.branches.resize(end, span.branch().unwrap_or(-1));
        self.images.resize(end, image);
    }

    pub(super) fn tensor(&self, values: &[i64], device: Device) -> Tensor {
        Tensor::from_slice(values).view(self.shape).to_device(device)
    }

    /// `[batch, 1, seq, seq]`, additive
    pub(super) fn mask(&self, window: Option<i64>, device: Device, kind: Kind) -> Tensor {
        let [batch, seq] = self.shape;
        let of_query = |values: &[i64]| self.tensor(values, device).view([batch, seq, 1]);
        let of_key = |values: &[i64]| self.tensor(values, device).view([batch, 1, seq]);
        let same = |values: &[i64]| of_query(values).eq_tensor(&of_key(values)); // [batch, seq, seq]
        let earlier = Tensor::ones([seq, seq], (Kind::Bool, device)).tril(0);
        let on_my_way = of_key(&self.branches).eq(-1).logical_or(&same(&self.branches));
        let same_image = same(&self.images).logical_and(&of_query(&self.images).ge(0));
        let mut causal = on_my_way.logical_and(&earlier); // [batch, seq, seq]
        if let Some(window) = window {
            causal = causal.logical_and(&(of_query(&self.positions) - of_key(&self.positions)).lt(window));
        }
        let is_padding = of_query(&self.documents).eq(PADDING);
        let is_all = of_key(&self.documents).eq(ALL).logical_and(&is_padding.logical_not());
        let my_document = same(&self.documents).logical_or(&is_all);
        let seen = causal.logical_or(&same_image).logical_and(&my_document);
        Tensor::zeros([batch, seq, seq], (kind, device))
            .masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
            .unsqueeze(1)
    }
}
