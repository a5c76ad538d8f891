//! What a batch asks of its layers: the kernel that serves its attention, and the tokens that adapters act on.

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_lora::{Active, ActsOn};
use vora_text::{Span, Spans};
use vora_torch::nn::attention::{Bands, has_attention};
use vora_torch::nn::decode::LoraId;

use super::bands::bands;
use super::mask::Tokens;
use super::mode::VisionAttention;
use super::segments::{Layout, Segment};

/// The kernel that serves a batch.
#[derive(Debug)]
pub(super) enum Kernel {
    /// One causal call without a mask.
    Causal,
    /// One call a segment, for rows that all have the same simple layout.
    Segments(Vec<Segment>),
    /// One call that is told the keys of each query.
    Bands(Bands),
    /// One call with an additive mask `[batch, 1, seq, seq]`: 0 where a query attends to a key, minus infinity elsewhere.
    Mask(Tensor),
}

impl Kernel {
    /// The same for some of one row's queries.
    fn of_part(self, part: &Range<i64>) -> Self {
        match self {
            Self::Bands(bands) => Self::Bands(bands.of_queries(part)),
            Self::Mask(mask) => Self::Mask(mask.narrow(2, part.start, part.end - part.start).narrow(3, 0, part.end)),
            whole => whole,
        }
    }
}

/// Everything about a batch that its layers share; made once per batch.
#[derive(Debug)]
pub struct AttentionPlan {
    position_ids: Tensor, // [batch, seq]
    num_positions: i64,
    row_lens: Vec<i64>,
    cacheable: bool,
    spans: Spans,
    part: Range<i64>, // of every row, that the queries are
    mode: VisionAttention,
    kind: Kind,
    pub(super) kernel: Kernel,
    adapters: Active,
    adapted_rows: Vec<LoraId>, // which adapters act on what generation adds to a row
}

/// Which kernel [`AttentionPlan::with_kernel`] is to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelChoice {
    /// A causal call without a mask, for rows of one text document.
    Causal,
    /// One call for each text and image span.
    Segments,
    /// One call that computes what each query attends to and nothing else; serves everything, in f32 and bf16 on the CPU.
    Bands,
    /// One call with a mask; serves everything.
    Mask,
}

impl AttentionPlan {
    /// Checks `spans` and plans for them: on the CPU a call that computes what each query attends to, so that time grows
    /// as if each packed document had a row of its own, and memory with the number of tokens; elsewhere a plain causal call
    /// where nothing asks for more, else one mask for all layers.
    ///
    /// `kind` is the queries' dtype. Outputs of padding are finite and mean nothing.
    ///
    /// # Errors
    /// See [`Spans::validate`].
    pub fn new(spans: &Spans, mode: VisionAttention, device: Device, kind: Kind) -> Result<Self> {
        spans.validate()?;
        Ok(Self::build(spans, mode, device, kind, choose(spans, mode, device, kind)))
    }

    /// As [`AttentionPlan::new`] with the kernel given, to compare kernels.
    ///
    /// # Errors
    /// Where that kernel does not serve these spans.
    pub fn with_kernel(
        spans: &Spans,
        mode: VisionAttention,
        device: Device,
        kind: Kind,
        choice: KernelChoice,
    ) -> Result<Self> {
        spans.validate()?;
        let layout = Layout::of(spans, mode);
        match (choice, &layout) {
            (KernelChoice::Mask, _) | (KernelChoice::Segments, Some(_)) => {}
            (KernelChoice::Bands, _) if has_attention(device, kind) => {}
            (KernelChoice::Causal, Some(layout)) if layout.is_causal() => {}
            _ => bail!("kernel {choice:?} does not serve these spans"),
        }
        Ok(Self::build(spans, mode, device, kind, choice))
    }

    /// The same with the model's own adapters acting on these tokens alone; without it they act on all.
    #[must_use]
    pub fn with_adapters(self, acts_on: ActsOn) -> Self {
        let (adapters, adapted_rows) = active(&self.spans, acts_on, self.position_ids.device());
        Self { adapters, adapted_rows, ..self }
    }

    /// The same without adapters: what the layers do is what they did before any was attached.
    #[must_use]
    pub fn without_adapters(self) -> Self {
        self.with_lora(LoraId::NONE)
    }

    /// The same with another adapter wherever one acts.
    #[must_use]
    pub fn with_lora(self, id: LoraId) -> Self {
        let device = self.position_ids.device();
        let all = || Tensor::arange(self.batch() * self.position_ids.size()[1], (Kind::Int64, device));
        let adapters = match self.adapters {
            _ if id == LoraId::NONE => Active::Off,
            own if id == LoraId::OWN => own,
            Active::Off => Active::Off,
            Active::All => Active::Each(vec![(id, all())]),
            Active::At(places) => Active::Each(vec![(id, places)]),
            Active::Each(each) => Active::Each(each.into_iter().map(|(_, places)| (id, places)).collect()),
        };
        let adapted = |&of: &LoraId| if of == LoraId::NONE { of } else { id };
        Self { adapters, adapted_rows: self.adapted_rows.iter().map(adapted).collect(), ..self }
    }

    /// The same batch for layers with a sliding window: a token attends to itself and the `window - 1` positions before it,
    /// nothing earlier. None where no row is long enough for that to hide anything.
    ///
    /// Positions are those of [`Span`], so a branch looks back along its own way. The tokens of an image that
    /// attend to all of each other go on to do so, however large it is; text after the image attends to the part that
    /// its window reaches. HF combines Gemma 3's windows and images in the same way.
    ///
    /// On the CPU, and where a causal call or calls by segment serve the rows, time and memory grow with `seq * window`;
    /// the others take one mask.
    #[must_use]
    pub fn within(&self, window: i64) -> Option<Self> {
        if self.num_positions <= window {
            return None;
        }
        let device = self.position_ids.device();
        let layout = || Layout::of(&self.spans, self.mode);
        let kernel = match &self.kernel {
            Kernel::Bands(_) => Kernel::Bands(bands(&self.spans, self.mode, Some(window))),
            Kernel::Causal | Kernel::Segments(_) if let Some(layout) = layout() => {
                Kernel::Segments(layout.segments(Some(window), device, self.kind))
            }
            _ => Kernel::Mask(Tokens::of(&self.spans, self.mode).mask(Some(window), device, self.kind)),
        };
        let kernel = if self.part == (0..self.spans.seq()) { kernel } else { kernel.of_part(&self.part) };
        Some(Self {
            position_ids: self.position_ids.shallow_clone(),
            row_lens: self.row_lens.clone(),
            spans: self.spans.clone(),
            part: self.part.clone(),
            kernel,
            adapters: self.adapters.clone(),
            adapted_rows: self.adapted_rows.clone(),
            ..*self
        })
    }

    /// The same for a part of the only row's tokens, which attend to what comes before them and among themselves, as they do in
    /// the whole: what comes before has to be held elsewhere. No bidirectional block may reach beyond the part; what of one
    /// lies before it is held.
    ///
    /// # Errors
    /// Where there are several rows or documents, the part is none of the row's, or it ends within such a block.
    pub fn part(&self, part: Range<i64>) -> Result<Self> {
        let seq = self.spans.seq();
        ensure!(self.batch() == 1 && self.cacheable, "only one row of one document goes through in parts");
        ensure!(0 <= part.start && part.start < part.end && part.end <= seq, "part {part:?} of {seq} tokens");
        let end = self.whole_blocks(part.end);
        ensure!(end == part.end, "part {part:?} ends within a picture, which ends at {end}");
        let kernel = match &self.kernel {
            Kernel::Bands(_) => Kernel::Bands(bands(&self.spans, self.mode, None)).of_part(&part),
            Kernel::Causal if part.start == 0 => Kernel::Causal,
            _ => {
                let mask = Tokens::of(&self.spans, self.mode).mask(None, self.position_ids.device(), self.kind);
                Kernel::Mask(mask).of_part(&part)
            }
        };
        let adapters = match &self.adapters {
            Active::At(places) => {
                let places = within(places, &part);
                match places.numel() as i64 {
                    0 => Active::Off,
                    all if all == part.end - part.start => Active::All,
                    _ => Active::At(places),
                }
            }
            Active::Each(each) => {
                let each = each.iter().map(|(id, places)| (*id, within(places, &part)));
                Active::Each(each.filter(|(_, places)| places.numel() > 0).collect())
            }
            whole => whole.clone(),
        };
        Ok(Self {
            position_ids: self.position_ids.narrow(1, part.start, part.end - part.start),
            row_lens: self.row_lens.clone(),
            spans: self.spans.clone(),
            kernel,
            adapters,
            adapted_rows: self.adapted_rows.clone(),
            part,
            ..*self
        })
    }

    /// The end of the bidirectional block that goes on at this place of the only row; the place itself where none does.
    pub fn whole_blocks(&self, place: i64) -> i64 {
        let mut start = 0;
        for span in self.spans.rows().iter().flatten() {
            let end = start + span.len();
            let fused = self.mode == VisionAttention::BidirectionalFused;
            let within = start < place && place < end || fused && start == place && self.follows_image(place);
            if within && span.is_image() && self.mode.is_bidirectional() {
                return if fused { self.whole_blocks(end) } else { end };
            }
            start = end;
        }
        place
    }

    /// Whether a picture of the only row ends at this place.
    fn follows_image(&self, place: i64) -> bool {
        let mut end = 0;
        self.spans.rows().iter().flatten().any(|span| {
            end += span.len();
            end == place && span.is_image()
        })
    }

    /// Which of the only row's tokens the queries are.
    pub(crate) fn part_of_row(&self) -> &Range<i64> {
        &self.part
    }

    fn build(spans: &Spans, mode: VisionAttention, device: Device, kind: Kind, choice: KernelChoice) -> Self {
        let tokens = Tokens::of(spans, mode);
        let kernel = match (choice, Layout::of(spans, mode)) {
            (KernelChoice::Causal, _) => Kernel::Causal,
            (KernelChoice::Bands, _) => Kernel::Bands(bands(spans, mode, None)),
            (KernelChoice::Segments, Some(layout)) => Kernel::Segments(layout.segments(None, device, kind)),
            _ => Kernel::Mask(tokens.mask(None, device, kind)),
        };
        let single = |row: &Vec<Span>| {
            !row.is_empty() && row.iter().all(|span| span.branch().is_none() && span.document() == row[0].document())
        };
        Self {
            num_positions: tokens.positions.iter().max().map_or(0, |last| last + 1),
            position_ids: tokens.tensor(&tokens.positions, device),
            row_lens: spans.row_lens().collect(),
            part: 0..spans.seq(),
            cacheable: spans.rows().iter().all(single),
            spans: spans.clone(),
            mode,
            kind,
            kernel,
            adapters: Active::All,
            adapted_rows: vec![LoraId::OWN; spans.rows().len()],
        }
    }

    /// The tokens that adapters act on.
    pub fn adapters(&self) -> &Active {
        &self.adapters
    }

    /// Which adapters act on what generation adds to each row.
    pub fn adapted_rows(&self) -> &[LoraId] {
        &self.adapted_rows
    }

    /// `[batch, seq]`, int64
    pub fn position_ids(&self) -> &Tensor {
        &self.position_ids
    }

    /// One more than the largest position.
    pub fn num_positions(&self) -> i64 {
        self.num_positions
    }

    /// Tokens of each row, padding not counted.
    pub fn row_lens(&self) -> &[i64] {
        &self.row_lens
    }

    /// Rows in the batch.
    pub fn batch(&self) -> i64 {
        self.row_lens.len() as i64
    }

    /// Which kernel was chosen.
    pub fn kernel_choice(&self) -> KernelChoice {
        match self.kernel {
            Kernel::Causal => KernelChoice::Causal,
            Kernel::Segments(_) => KernelChoice::Segments,
            Kernel::Bands(_) => KernelChoice::Bands,
            Kernel::Mask(_) => KernelChoice::Mask,
        }
    }

    /// The additive mask `[batch, 1, seq, seq]` of a plan that has one.
    pub fn mask(&self) -> Option<&Tensor> {
        match &self.kernel {
            Kernel::Mask(mask) => Some(mask),
            _ => None,
        }
    }

    /// Whether generation can go on from every row: each is one document without branches.
    pub(crate) fn is_cacheable(&self) -> bool {
        self.cacheable
    }
}

/// Those of these places that lie in the part, counted from its start.
fn within(places: &Tensor, part: &Range<i64>) -> Tensor {
    let within = places.ge(part.start).logical_and(&places.lt(part.end));
    places.masked_select(&within) - part.start
}

/// The tokens that the model's own adapters act on by that rule, and whether they act on what generation adds to each row.
fn active(spans: &Spans, acts_on: ActsOn, device: Device) -> (Active, Vec<LoraId>) {
    // What all documents begin with is theirs alike: there no picture of one is none of the others'.
    let is_of = |span: &Span, document: Option<i64>| document.is_none() || span.document() == document;
    let has_image = |row: &[Span], document| row.iter().any(|span| span.is_image() && is_of(span, document));
    let acts = |row: &[Span], span: &Span| match acts_on {
        ActsOn::All => true,
        ActsOn::WithImage => has_image(row, span.document()),
        ActsOn::ImageTokens => span.is_image(),
    };
    let (seq, mut places) = (spans.seq(), Vec::new());
    for (row_idx, row) in (0..).zip(spans.rows()) {
        let mut start = row_idx * seq;
        for span in row {
            if acts(row, span) {
                places.extend(start..start + span.len());
            }
            start += span.len();
        }
    }
    let all = places.len() as i64 == spans.num_tokens();
    let active = match places.is_empty() {
        true => Active::Off,
        false if all => Active::All,
        false => Active::At(Tensor::from_slice(&places).to_device(device)),
    };
    let goes_on = |row: &Vec<Span>| match acts_on {
        ActsOn::All => true,
        ActsOn::WithImage => row.iter().any(Span::is_image), // rows that can be continued are one document
        ActsOn::ImageTokens => false,
    };
    (active, spans.rows().iter().map(|row| LoraId::own_if(goes_on(row))).collect())
}

/// A mask reads and writes `seq^2` numbers that neither bands nor causal calls need. On a GPU it goes before calls by
/// segment: a call costs the host more than its work costs the device. On an H200 the segments around one image of 64 to
/// 1024 tokens took 1.4 ms forward and backward, whatever its size, a causal call 0.25 ms.
fn choose(spans: &Spans, mode: VisionAttention, device: Device, kind: Kind) -> KernelChoice {
    match Layout::of(spans, mode) {
        _ if has_attention(device, kind) => KernelChoice::Bands,
        Some(layout) if layout.is_causal() => KernelChoice::Causal,
        _ => KernelChoice::Mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Device, Kind) = (Device::Cpu, Kind::Float);

    fn plan(rows: Vec<Vec<Span>>, mode: VisionAttention) -> AttentionPlan {
        AttentionPlan::new(&Spans::new(rows), mode, F32.0, F32.1).unwrap()
    }

    /// The rule of [`Span`], token by token; how far back a token looks is counted over the tokens on its way.
    fn reference(row: &[Span], mode: VisionAttention, window: usize, seq: usize) -> Vec<Vec<bool>> {
        let owner: Vec<usize> = row.iter().enumerate().flat_map(|(i, s)| vec![i; s.len() as usize]).collect();
        let reaches = |q: usize, k: usize| {
            let (from, to) = (&row[owner[q]], &row[owner[k]]);
            let is_mine = to.document().is_none() || to.document() == from.document();
            is_mine && k <= q && (to.branch().is_none() || to.branch() == from.branch())
        };
        let fused = |a: usize, b: usize| {
            let way = |span: &Span| (span.document(), span.branch());
            let between = row[a.min(b)..=a.max(b)].iter().filter(|span| way(span) == way(&row[a]));
            way(&row[a]) == way(&row[b]) && between.clone().all(Span::is_image)
        };
        let sees = |q: usize, k: usize| match (owner.get(q), owner.get(k)) {
            (Some(&a), Some(&b)) => {
                let whole = match mode {
                    VisionAttention::Bidirectional => a == b && row[a].is_image(),
                    VisionAttention::BidirectionalFused => fused(a, b),
                    VisionAttention::Causal => false,
                };
                whole || (reaches(q, k) && (k..q).filter(|&between| reaches(q, between)).count() < window)
            }
            (None, None) => k <= q,
            _ => false,
        };
        (0..seq).map(|q| (0..seq).map(|k| sees(q, k)).collect()).collect()
    }

    /// The parts of a plan, put together, are the plan: by bands and by a mask, within a window and without one.
    #[test]
    fn parts_of_a_row_see_what_they_see_in_the_whole() {
        let row = vec![Span::text(3), Span::image(2, 2), Span::image(1, 3), Span::text(5), Span::image(1, 2)];
        let spans = Spans::new(vec![row]);
        let modes = [
            (VisionAttention::Causal, 17),
            (VisionAttention::Bidirectional, 11),
            (VisionAttention::BidirectionalFused, 10),
        ];
        for (mode, ways_to_end) in modes {
            for choice in [KernelChoice::Bands, KernelChoice::Mask] {
                let whole = AttentionPlan::with_kernel(&spans, mode, F32.0, F32.1, choice).unwrap();
                let whole = whole.with_adapters(ActsOn::ImageTokens);
                let ends: Vec<i64> = (1..=17).filter(|&end| whole.whole_blocks(end) == end).collect();
                assert_eq!(ends.len(), ways_to_end, "{mode:?} {ends:?}");
                for window in [None, Some(4)] {
                    let seen = |plan: &AttentionPlan, queries| match &window
                        .and_then(|w| plan.within(w))
                        .as_ref()
                        .unwrap_or(plan)
                        .kernel
                    {
                        Kernel::Bands(bands) => bands.mask(queries, 17, F32.0, F32.1),
                        Kernel::Mask(mask) => mask.constant_pad_nd([0, 17 - mask.size()[3]]),
                        other => panic!("{other:?}"),
                    };
                    let expected = seen(&whole, 17);
                    for (start, &end) in (0..17).flat_map(|start| ends.iter().map(move |end| (start, end))) {
                        if start >= end {
                            assert!(whole.part(start..end).is_err());
                            continue;
                        }
                        let part = whole.part(start..end).unwrap();
                        let found = seen(&part, end - start).narrow(3, 0, end);
                        assert!(
                            found.equal(&expected.narrow(2, start, end - start).narrow(3, 0, end)),
                            "{start}..{end}"
                        );
                        assert!(part.position_ids().equal(&whole.position_ids().narrow(1, start, end - start)));
                        let is_image = |place: &i64| (3..10).contains(place) || (15..17).contains(place);
                        let expected: Vec<i64> = (start..end).filter(is_image).map(|place| place - start).collect();
                        match part.adapters() {
                            Active::Off => assert!(expected.is_empty()),
                            Active::All => assert_eq!(expected.len() as i64, end - start),
                            Active::At(places) => assert_eq!(Vec::<i64>::try_from(places).unwrap(), expected),
                            Active::Each(each) => panic!("{each:?}"),
                        }
                    }
                }
                if mode.is_bidirectional() {
                    let error = whole.part(0..5).unwrap_err().to_string();
                    let end = if mode == VisionAttention::BidirectionalFused { 10 } else { 7 };
                    assert_eq!(error, format!("part 0..5 ends within a picture, which ends at {end}"));
                }
            }
        }
        let two = plan(vec![vec![Span::text(2)], vec![Span::text(2)]], VisionAttention::Causal);
        assert!(two.part(0..1).unwrap_err().to_string().contains("only one row"));
    }

    #[test]
    fn the_mask_is_the_rule_of_spans() {
        let rows = vec![
            vec![
                Span::text(2),
                Span::image(2, 2),
                Span::image(1, 3),
                Span::text(3).on_branch(0),
                Span::text(2).on_branch(4),
                Span::image(1, 2).on_branch(4),
                Span::text(1).on_branch(0),
            ],
            vec![Span::image(2, 1), Span::text(2), Span::text(3).in_document(1), Span::image(1, 2).in_document(1)],
            vec![
                Span::text(2).in_all_documents(),
                Span::text(1).in_all_documents(),
                Span::image(1, 2),
                Span::text(1).on_branch(0),
                Span::text(2).on_branch(1),
                Span::image(1, 3).in_document(1),
                Span::text(2).in_document(1),
            ],
        ];
        let windows = [17, 12, 5, 3, 1];
        let modes = [VisionAttention::Bidirectional, VisionAttention::BidirectionalFused, VisionAttention::Causal];
        for (mode, window) in modes.into_iter().flat_map(|m| windows.map(|w| (m, w))) {
            let spans = Spans::new(rows.clone());
            for choice in [KernelChoice::Mask, KernelChoice::Bands] {
                let plan = AttentionPlan::with_kernel(&spans, mode, F32.0, F32.1, choice).unwrap();
                let plan = if window == 17 { plan } else { plan.within(window).unwrap() };
                let (mask, is_dense) = match &plan.kernel {
                    Kernel::Mask(mask) => (mask.shallow_clone(), true),
                    Kernel::Bands(bands) => (bands.mask(17, 17, F32.0, F32.1), false),
                    other => panic!("{other:?}"),
                };
                assert_eq!(mask.size(), [3, 1, 17, 17]);
                for (row_idx, row) in rows.iter().enumerate() {
                    // Bands have no padding: there a mask made of them hides nothing.
                    let len = if is_dense { 17 } else { row.iter().map(Span::len).sum::<i64>() };
                    let found = mask.get(row_idx as i64).narrow(1, 0, len);
                    let found: Vec<f32> = found.flatten(0, -1).try_into().unwrap();
                    let expected = reference(row, mode, window as usize, 17)[..len as usize].concat();
                    let expected: Vec<f32> =
                        expected.iter().map(|&seen| if seen { 0.0 } else { f32::NEG_INFINITY }).collect();
                    assert_eq!(found, expected, "{choice:?}, row {row_idx}, {mode:?}, {window}");
                }
            }
        }
        let plan = plan(rows, VisionAttention::Bidirectional);
        let positions: Vec<i64> = plan.position_ids().get(0).try_into().unwrap();
        assert_eq!(positions, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 9, 10, 11, 12, 12]);
        let positions: Vec<i64> = plan.position_ids().get(1).narrow(0, 0, 9).try_into().unwrap();
        assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2, 3, 4]);
        let positions: Vec<i64> = plan.position_ids().get(2).narrow(0, 0, 13).try_into().unwrap();
        assert_eq!(positions, [0, 1, 2, 3, 4, 5, 5, 6, 3, 4, 5, 6, 7]);
        assert_eq!(plan.num_positions(), 13);
    }

    #[test]
    fn adapters_act_on_the_tokens_of_their_rule() {
        let rows = vec![
            vec![
                Span::text(1),
                Span::image(1, 2),
                Span::text(1).on_branch(0),
                Span::text(2).in_document(1),
                Span::text(1).in_document(2),
                Span::image(1, 1).in_document(2),
            ],
            vec![Span::text(3)],
        ];
        let at = |rows: &[Vec<Span>], acts_on| {
            let plan = plan(rows.to_vec(), VisionAttention::Bidirectional).with_adapters(acts_on);
            let narrow = plan.within(2).map(|plan| format!("{:?}", plan.adapters()));
            assert!(narrow.is_none_or(|narrow| narrow == format!("{:?}", plan.adapters())));
            let places = match plan.adapters() {
                Active::All => vec![-1],
                Active::Off => vec![],
                Active::At(places) => Vec::<i64>::try_from(places).unwrap(),
                Active::Each(each) => panic!("{each:?}"),
            };
            (places, plan.adapted_rows().iter().map(|&id| id == LoraId::OWN).collect::<Vec<bool>>())
        };
        assert_eq!(at(&rows, ActsOn::All), (vec![-1], vec![true, true]));
        assert_eq!(at(&rows, ActsOn::WithImage).0, [0, 1, 2, 3, 6, 7]);
        assert_eq!(at(&rows, ActsOn::ImageTokens), (vec![1, 2, 7], vec![false, false]));
        // A row that is longer than another: places count padding.
        let rows = [vec![Span::text(4)], vec![Span::text(1), Span::image(1, 1)]];
        assert_eq!(at(&rows, ActsOn::WithImage), (vec![4, 5], vec![false, true]));
        assert_eq!(at(&rows, ActsOn::ImageTokens), (vec![5], vec![false, false]));
        assert_eq!(at(&rows[..1], ActsOn::WithImage), (vec![], vec![false]));
        assert_eq!(at(&rows[1..], ActsOn::WithImage), (vec![-1], vec![true]));
        let off = plan(rows.to_vec(), VisionAttention::Bidirectional).without_adapters();
        assert!(matches!(off.adapters(), Active::Off) && off.adapted_rows() == [LoraId::NONE; 2]);
        // One by name acts where the own ones would, in parts too.
        let named = LoraId::named(3).unwrap();
        let row = vec![Span::text(2), Span::image(1, 2), Span::text(1)];
        let plan = plan(vec![row], VisionAttention::Bidirectional);
        let by_token = |plan: &AttentionPlan| plan.adapters().by_token(plan.position_ids().numel()).unwrap();
        let plan = plan.with_lora(named);
        assert_eq!((by_token(&plan), plan.adapted_rows()), (vec![named; 5], &[named][..]));
        let plan = plan.with_adapters(ActsOn::ImageTokens).with_lora(named);
        let none = LoraId::NONE;
        assert_eq!((by_token(&plan), plan.adapted_rows()), (vec![none, none, named, named, none], &[none][..]));
        assert_eq!(by_token(&plan.part(1..5).unwrap()), [none, named, named, none]);
        assert!(matches!(plan.with_lora(LoraId::NONE).adapters(), Active::Off));
    }

    #[test]
    fn adjacent_images_fuse_where_it_is_asked_for() {
        let row = vec![Span::text(1), Span::image(1, 2), Span::image(1, 1), Span::text(1), Span::image(1, 1)];
        let seen = |mode| {
            let spans = Spans::new(vec![row.clone()]);
            let plan = AttentionPlan::with_kernel(&spans, mode, F32.0, F32.1, KernelChoice::Mask).unwrap();
            let Kernel::Mask(mask) = &plan.kernel else { panic!("{:?}", plan.kernel) };
            let rows = Vec::<Vec<f32>>::try_from(mask.view([6, 6])).unwrap();
            rows.iter()
                .map(|row| row.iter().map(|&m| if m == 0.0 { 'x' } else { '.' }).collect())
                .collect::<Vec<String>>()
        };
        let apart = ["x.....", "xxx...", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"];
        let fused = ["x.....", "xxxx..", "xxxx..", "xxxx..", "xxxxx.", "xxxxxx"];
        assert_eq!(seen(VisionAttention::Bidirectional), apart);
        assert_eq!(seen(VisionAttention::BidirectionalFused), fused);
    }

    #[test]
    fn the_cheapest_kernel_that_serves() {
        use VisionAttention::{Bidirectional, Causal};
        let gpu = Device::Cuda(0);
        for (row, mode, device, kind, expected) in [
            (vec![Span::text(5)], Bidirectional, Device::Cpu, Kind::Float, KernelChoice::Bands),
            (vec![Span::text(2), Span::image(2, 2)], Bidirectional, Device::Cpu, Kind::BFloat16, KernelChoice::Bands),
            (vec![Span::text(5)], Bidirectional, Device::Cpu, Kind::Double, KernelChoice::Causal),
            (vec![Span::text(2), Span::image(2, 2)], Bidirectional, Device::Cpu, Kind::Double, KernelChoice::Mask),
            (vec![Span::text(5)], Bidirectional, gpu, Kind::Float, KernelChoice::Causal),
            (vec![Span::text(2), Span::image(2, 2)], Causal, gpu, Kind::Float, KernelChoice::Causal),
            (vec![Span::text(2), Span::image(8, 8)], Bidirectional, gpu, Kind::Float, KernelChoice::Mask),
            (vec![Span::text(2), Span::text(2).in_document(1)], Causal, gpu, Kind::Float, KernelChoice::Mask),
        ] {
            assert_eq!(choose(&Spans::new(vec![row.clone()]), mode, device, kind), expected, "{row:?} on {device:?}");
        }
        let spans = Spans::new(vec![vec![Span::image(1, 2)]]);
        let error = AttentionPlan::with_kernel(&spans, Bidirectional, F32.0, F32.1, KernelChoice::Causal).unwrap_err();
        assert!(error.to_string().contains("kernel Causal does not serve these spans"), "{error}");
    }

    #[test]
    fn a_window_that_hides_nothing_needs_no_plan_of_its_own() {
        let spans = Spans::text(&[5, 3]);
        let mode = VisionAttention::Bidirectional;
        let text = AttentionPlan::with_kernel(&spans, mode, F32.0, F32.1, KernelChoice::Causal).unwrap();
        assert!(text.within(5).is_none());
        let windowed = text.within(4).unwrap();
        assert_eq!((windowed.num_positions(), windowed.row_lens()), (5, &[5, 3][..]));
        // Two calls: the first four tokens, causal, and the fifth with the four that it attends to.
        let Kernel::Segments(segments) = &windowed.kernel else { panic!("{:?}", windowed.kernel) };
        let parts: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.first_key, s.causal)).collect();
        assert_eq!(parts, [(0, 4, 0, true), (4, 5, 1, false)]);
        assert!(segments[0].mask.is_none());
    }
}
