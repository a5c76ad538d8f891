//! What a batch asks of its layers: the kernel that serves its attention, and the tokens that adapters act on.

use std::collections::HashSet;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};
use vora_lora::{Active, ActsOn};
use vora_text::{Span, Spans};

use super::mask::Tokens;
use super::mode::VisionAttention;
use super::segments::{Layout, Segment};

/// Tokens that every image needs for calls of their own to be worth it. Measured on one CPU core in f32 with nine
/// heads, 76 tokens of text around one image, forward / forward and backward, against one call with a mask: 64 tokens
/// -7% / -10%, 256 tokens -24% / -5%, 1024 tokens -24% / -11%.
const MIN_IMAGE_FOR_SEGMENTS: i64 = 64;

/// The kernel that serves a batch.
#[derive(Debug)]
pub(super) enum Kernel {
    /// One causal call without a mask.
    Causal,
    /// One call a segment, for rows that all have the same simple layout.
    Segments(Vec<Segment>),
    /// A plan for each document of each row, in order: none attends to another.
    Documents(Vec<Vec<AttentionPlan>>),
    /// One call with an additive mask `[batch, 1, seq, seq]`: 0 where a query attends to a key, minus infinity elsewhere.
    Mask(Tensor),
}

/// Everything about a batch that its layers share; made once per batch.
#[derive(Debug)]
pub struct AttentionPlan {
    position_ids: Tensor, // [batch, seq]
    num_positions: i64,
    row_lens: Vec<i64>,
    cacheable: bool,
    spans: Spans,
    mode: VisionAttention,
    kind: Kind,
    pub(super) kernel: Kernel,
    adapters: Active,
    adapted_rows: Vec<bool>, // whether adapters act on what generation adds to a row
}

/// Which kernel [`AttentionPlan::with_kernel`] is to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelChoice {
    /// A causal call without a mask, for rows of one text document.
    Causal,
    /// One call for each text and image span.
    Segments,
    /// For each document what it would take alone, for rows that hold several one after the other.
    Documents,
    /// One call with a mask; serves everything.
    Mask,
}

impl AttentionPlan {
    /// Checks `spans` and plans for them: a plain causal call where nothing asks for more; on the CPU a call for each
    /// span where all rows have the same layout and their images are long, and each document for itself where rows are
    /// packed with several, so that time and memory grow as if each had a row of its own; else one mask for all layers.
    ///
    /// `kind` is the queries' dtype. Padding attends only to padding, or, in a causal call, whatever came before it; its
    /// outputs are finite and mean nothing.
    ///
    /// # Errors
    /// See [`Spans::validate`].
    pub fn new(spans: &Spans, mode: VisionAttention, device: Device, kind: Kind) -> Result<Self> {
        spans.validate()?;
        Ok(Self::build(spans, mode, device, kind, choose(spans, mode, device)))
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
            (KernelChoice::Documents, _) if documents(spans).is_some() => {}
            (KernelChoice::Causal, Some(layout)) if layout.is_causal() => {}
            _ => bail!("kernel {choice:?} does not serve these spans"),
        }
        Ok(Self::build(spans, mode, device, kind, choice))
    }

    /// The same with adapters that act on these tokens alone; without it they act on all.
    #[must_use]
    pub fn with_adapters(self, acts_on: ActsOn) -> Self {
        let (adapters, adapted_rows) = active(&self.spans, acts_on, self.position_ids.device());
        Self { adapters, adapted_rows, ..self }
    }

    /// The same without adapters: what the layers do is what they did before any was attached.
    #[must_use]
    pub fn without_adapters(self) -> Self {
        Self { adapters: Active::Off, adapted_rows: vec![false; self.row_lens.len()], ..self }
    }

    /// The same batch for layers with a sliding window: a token attends to itself and the `window - 1` positions before it,
    /// nothing earlier. None where no row is long enough for that to hide anything.
    ///
    /// Positions are those of [`Span`], so a branch looks back along its own way. The tokens of an image that
    /// attend to all of each other go on to do so, however large it is; text after the image attends to the part that
    /// its window reaches. HF combines Gemma 3's windows and images in the same way.
    ///
    /// Rows, or packed documents, that a causal call or calls by segment serve are cut into segments no longer than the
    /// window, so time and memory grow with `seq * window`; the others take one mask.
    #[must_use]
    pub fn within(&self, window: i64) -> Option<Self> {
        if self.num_positions <= window {
            return None;
        }
        let device = self.position_ids.device();
        let layout = match self.kernel {
            Kernel::Mask(_) | Kernel::Documents(_) => None,
            Kernel::Causal | Kernel::Segments(_) => Layout::of(&self.spans, self.mode),
        };
        let kernel = match (&self.kernel, layout) {
            (Kernel::Documents(rows), _) => {
                let within = |plan: &Self| plan.within(window).unwrap_or_else(|| plan.again(device));
                Kernel::Documents(rows.iter().map(|row| row.iter().map(within).collect()).collect())
            }
            (_, Some(layout)) => Kernel::Segments(layout.segments(Some(window), device, self.kind)),
            (_, None) => Kernel::Mask(Tokens::of(&self.spans, self.mode).mask(Some(window), device, self.kind)),
        };
        Some(Self {
            position_ids: self.position_ids.shallow_clone(),
            row_lens: self.row_lens.clone(),
            spans: self.spans.clone(),
            kernel,
            adapters: self.adapters.clone(),
            adapted_rows: self.adapted_rows.clone(),
            ..*self
        })
    }

    fn build(spans: &Spans, mode: VisionAttention, device: Device, kind: Kind, choice: KernelChoice) -> Self {
        let tokens = Tokens::of(spans, mode);
        let kernel = match (choice, Layout::of(spans, mode), documents(spans)) {
            (KernelChoice::Causal, ..) => Kernel::Causal,
            (KernelChoice::Segments, Some(layout), _) => Kernel::Segments(layout.segments(None, device, kind)),
            (KernelChoice::Documents, _, Some(rows)) => {
                let plan = |spans: &Spans| Self::build(spans, mode, device, kind, choose(spans, mode, device));
                Kernel::Documents(rows.iter().map(|row| row.iter().map(plan).collect()).collect())
            }
            _ => Kernel::Mask(tokens.mask(None, device, kind)),
        };
        let single = |row: &Vec<Span>| {
            !row.is_empty() && row.iter().all(|span| span.branch().is_none() && span.document() == row[0].document())
        };
        Self {
            num_positions: tokens.positions.iter().max().map_or(0, |last| last + 1),
            position_ids: tokens.tensor(&tokens.positions, device),
            row_lens: spans.row_lens().collect(),
            cacheable: spans.rows().iter().all(single),
            spans: spans.clone(),
            mode,
            kind,
            kernel,
            adapters: Active::All,
            adapted_rows: vec![true; spans.rows().len()],
        }
    }

    /// The same plan once more.
    fn again(&self, device: Device) -> Self {
        Self::build(&self.spans, self.mode, device, self.kind, self.kernel_choice())
    }

    /// The tokens that adapters act on.
    pub fn adapters(&self) -> &Active {
        &self.adapters
    }

    /// Whether adapters act on what generation adds to each row.
    pub(crate) fn adapted_rows(&self) -> &[bool] {
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
            Kernel::Documents(_) => KernelChoice::Documents,
            Kernel::Mask(_) => KernelChoice::Mask,
        }
    }

    /// Whether generation can go on from every row: each is one document without branches.
    pub(crate) fn is_cacheable(&self) -> bool {
        self.cacheable
    }
}

/// The tokens that adapters act on by that rule, and whether they act on what generation adds to each row.
fn active(spans: &Spans, acts_on: ActsOn, device: Device) -> (Active, Vec<bool>) {
    let has_image = |row: &[Span], document| row.iter().any(|span| span.is_image() && span.document() == document);
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
    (active, spans.rows().iter().map(goes_on).collect())
}

/// A mask reads and writes `seq^2` numbers that causal calls need not, so those come first; calls by segment follow
/// where every image is long. Of a packed row's mask most is minus infinity, so each document is served alone.
///
/// Not so on a GPU: a call costs the host more than its work costs the device. On an H200 the segments around one image
/// of 64 to 1024 tokens took 1.4 ms forward and backward, whatever its size, a causal call 0.25 ms; and a batch of 3,500
/// packed samples took 20 s a step.
fn choose(spans: &Spans, mode: VisionAttention, device: Device) -> KernelChoice {
    let is_packed = |row: &Vec<Span>| row.iter().any(|span| span.document() != row[0].document());
    match Layout::of(spans, mode) {
        Some(layout) if layout.is_causal() => KernelChoice::Causal,
        _ if device != Device::Cpu => KernelChoice::Mask,
        Some(layout) if layout.min_image() >= MIN_IMAGE_FOR_SEGMENTS => KernelChoice::Segments,
        None if spans.rows().iter().any(is_packed) && documents(spans).is_some() => KernelChoice::Documents,
        _ => KernelChoice::Mask,
    }
}

/// The documents of each row, each as a batch of its own; none where a document is in pieces with another between.
fn documents(spans: &Spans) -> Option<Vec<Vec<Spans>>> {
    let of_row = |row: &Vec<Span>| {
        let documents: Vec<&[Span]> = row.chunk_by(|a, b| a.document() == b.document()).collect();
        let distinct: HashSet<i64> = documents.iter().map(|document| document[0].document()).collect();
        let alone = |document: &[Span]| Spans::new(vec![document.to_vec()]);
        (distinct.len() == documents.len()).then(|| documents.into_iter().map(alone).collect())
    };
    spans.rows().iter().map(of_row).collect()
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
            from.document() == to.document() && k <= q && (to.branch().is_none() || to.branch() == from.branch())
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
            vec![Span::text(4)],
        ];
        let windows = [17, 12, 5, 3, 1];
        let modes = [VisionAttention::Bidirectional, VisionAttention::BidirectionalFused, VisionAttention::Causal];
        for (mode, window) in modes.into_iter().flat_map(|m| windows.map(|w| (m, w))) {
            let spans = Spans::new(rows.clone());
            let plan = AttentionPlan::with_kernel(&spans, mode, F32.0, F32.1, KernelChoice::Mask).unwrap();
            let plan = if window == 17 { plan } else { plan.within(window).unwrap() };
            let Kernel::Mask(mask) = &plan.kernel else { panic!("{:?}", plan.kernel) };
            assert_eq!(mask.size(), [3, 1, 17, 17]);
            for (row_idx, row) in rows.iter().enumerate() {
                let found: Vec<f32> = mask.get(row_idx as i64).flatten(0, -1).try_into().unwrap();
                let expected: Vec<f32> = reference(row, mode, window as usize, 17)
                    .concat()
                    .iter()
                    .map(|&seen| if seen { 0.0 } else { f32::NEG_INFINITY })
                    .collect();
                assert_eq!(found, expected, "row {row_idx}, {mode:?}, {window}");
            }
        }
        let plan = plan(rows, VisionAttention::Bidirectional);
        let positions: Vec<i64> = plan.position_ids().get(0).try_into().unwrap();
        assert_eq!(positions, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 9, 10, 11, 12, 12]);
        let positions: Vec<i64> = plan.position_ids().get(1).narrow(0, 0, 9).try_into().unwrap();
        assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2, 3, 4]);
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
            };
            (places, plan.adapted_rows().to_vec())
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
        assert!(matches!(off.adapters(), Active::Off) && off.adapted_rows() == [false, false]);
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
        use VisionAttention::{Bidirectional, BidirectionalFused, Causal};
        let long = Span::image(8, 8);
        for (rows, mode, expected) in [
            (vec![vec![Span::text(5)]; 2], Bidirectional, KernelChoice::Causal),
            (vec![vec![Span::text(5)], vec![Span::text(2)]], Bidirectional, KernelChoice::Causal),
            (vec![vec![Span::text(2), Span::image(2, 2)], vec![Span::image(2, 1)]], Causal, KernelChoice::Causal),
            (vec![vec![Span::text(2), Span::image(2, 2)]], Bidirectional, KernelChoice::Mask),
            (vec![vec![Span::text(2), long, Span::text(3)], vec![Span::text(2), long]], Bidirectional, {
                KernelChoice::Segments
            }),
            (vec![vec![Span::text(2), long], vec![Span::text(3), long]], Bidirectional, KernelChoice::Mask),
            (vec![vec![Span::image(4, 8); 2]], Bidirectional, KernelChoice::Mask),
            (vec![vec![Span::image(4, 8); 2]], BidirectionalFused, KernelChoice::Segments),
            (vec![vec![Span::text(2), Span::text(2).in_document(1)]], Causal, KernelChoice::Documents),
            (vec![vec![long, Span::text(2).in_document(1)], vec![long]], Bidirectional, KernelChoice::Documents),
            (vec![[0, 1, 0].map(|n| Span::text(2).in_document(n)).to_vec()], Causal, KernelChoice::Mask),
            (vec![vec![Span::text(2), Span::text(2).on_branch(0)]], Causal, KernelChoice::Mask),
        ] {
            assert_eq!(plan(rows.clone(), mode).kernel_choice(), expected, "{rows:?}");
        }
        let (gpu, batch) = (Device::Cuda(0), |row| Spans::new(vec![row]));
        assert_eq!(choose(&batch(vec![Span::text(5)]), Bidirectional, gpu), KernelChoice::Causal);
        assert_eq!(choose(&batch(vec![Span::text(2), long]), Bidirectional, gpu), KernelChoice::Mask);
        let packed = batch(vec![Span::text(2), Span::text(2).in_document(1)]);
        assert_eq!(choose(&packed, Causal, gpu), KernelChoice::Mask);
        let spans = Spans::new(vec![vec![Span::image(1, 2)]]);
        let error = AttentionPlan::with_kernel(&spans, Bidirectional, F32.0, F32.1, KernelChoice::Causal).unwrap_err();
        assert!(error.to_string().contains("kernel Causal does not serve these spans"), "{error}");
    }

    #[test]
    fn a_window_that_hides_nothing_needs_no_plan_of_its_own() {
        let text = plan(vec![vec![Span::text(5)], vec![Span::text(3)]], VisionAttention::Bidirectional);
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
