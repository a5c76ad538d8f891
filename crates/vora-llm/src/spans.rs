//! Which tokens of a batch are text and which are an image, who sees whom, and what kernel computes that.

use std::collections::{HashMap, HashSet};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// Whether the tokens of one image see all of each other or only the earlier ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionAttention {
    /// All of each other, within one image; two adjacent images stay apart.
    #[default]
    Bidirectional,
    /// All of each other, within one image and the images right before and behind it: without text between them,
    /// several are one block, as in the published VoRA code. A folder's config says it by a key of its own.
    #[serde(skip)]
    BidirectionalFused,
    /// Only the earlier ones, like text; the published code calls it `default`.
    #[serde(alias = "default")]
    Causal,
}

impl VisionAttention {
    /// Whether an image sees all of itself.
    fn is_bidirectional(self) -> bool {
        self != Self::Causal
    }
}

/// What the tokens of a span are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modality {
    /// Word pieces.
    Text,
    /// Patches of one image, row by row.
    Image {
        /// Patches from top to bottom.
        rows: i64,
        /// Patches from left to right.
        cols: i64,
    },
}

/// A run of tokens of one modality.
///
/// A token sees the earlier tokens of its own document that lie on the trunk (`branch` none) or on its own branch:
/// several questions can share one image prefix in a single row without seeing each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// What its tokens are.
    pub modality: Modality,
    /// How many they are; an image has `rows * cols`.
    pub len: i64,
    /// Which of the documents packed into the row it belongs to; positions of each start at 0.
    pub document: i64,
    /// Which branch of the document it lies on. All branches come after the trunk, and positions on each go on from
    /// the trunk's end.
    pub branch: Option<i64>,
}

impl Span {
    /// Text on the trunk of document 0.
    pub fn text(len: i64) -> Self {
        Self { modality: Modality::Text, len, document: 0, branch: None }
    }

    /// An image on the trunk of document 0.
    pub fn image(rows: i64, cols: i64) -> Self {
        Self { modality: Modality::Image { rows, cols }, len: rows * cols, document: 0, branch: None }
    }

    /// The same span in another document of the row.
    pub fn in_document(self, document: i64) -> Self {
        Self { document, ..self }
    }

    /// The same span on a branch of its document.
    pub fn on_branch(self, branch: i64) -> Self {
        Self { branch: Some(branch), ..self }
    }

    fn is_image(&self) -> bool {
        matches!(self.modality, Modality::Image { .. })
    }
}

/// The spans of every row of a batch, in order; rows shorter than the longest are padded at their end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    /// One list a row.
    pub rows: Vec<Vec<Span>>,
}

impl Spans {
    /// Rows of nothing but text, of these lengths.
    pub fn text(lens: &[i64]) -> Self {
        Self { rows: lens.iter().map(|&len| vec![Span::text(len)]).collect() }
    }

    /// Rows in the batch.
    pub fn batch(&self) -> i64 {
        self.rows.len() as i64
    }

    /// Tokens of the longest row, padding of the others included.
    pub fn seq(&self) -> i64 {
        self.row_lens().max().unwrap_or(0)
    }

    /// Tokens in all rows, padding not counted.
    pub fn num_tokens(&self) -> i64 {
        self.row_lens().sum()
    }

    /// Tokens of each row, padding not counted.
    pub fn row_lens(&self) -> impl Iterator<Item = i64> {
        self.rows.iter().map(|row| row.iter().map(|span| span.len).sum())
    }

    /// Places of all image tokens in the batch flattened to `[batch * seq]`, in its order.
    pub fn image_positions(&self) -> Vec<i64> {
        let seq = self.seq();
        let mut positions = Vec::new();
        for (row_idx, row) in self.rows.iter().enumerate() {
            let mut start = row_idx as i64 * seq;
            for span in row {
                if span.is_image() {
                    positions.extend(start..start + span.len);
                }
                start += span.len;
            }
        }
        positions
    }

    /// Checks lengths, grids and the order of trunk and branches.
    ///
    /// # Errors
    /// Names row and span.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.rows.is_empty(), "a batch of no rows");
        ensure!(self.seq() > 0, "a batch of no tokens");
        for (row_idx, row) in self.rows.iter().enumerate() {
            let mut branched = Vec::new();
            for (span_idx, span) in row.iter().enumerate() {
                let place = || format!("row {row_idx}, span {span_idx}");
                ensure!(span.len > 0, "{}: length is {}, it must be at least 1", place(), span.len);
                ensure!(span.document >= 0, "{}: document is {}, it must not be negative", place(), span.document);
                if let Modality::Image { rows, cols } = span.modality {
                    ensure!(
                        rows > 0 && cols > 0 && rows.checked_mul(cols) == Some(span.len),
                        "{}: length is {}, its image has {rows} rows of {cols}",
                        place(),
                        span.len
                    );
                }
                match span.branch {
                    Some(branch) if branch < 0 => bail!("{}: branch is {branch}, it must not be negative", place()),
                    Some(_) => branched.push(span.document),
                    None => ensure!(
                        !branched.contains(&span.document),
                        "{}: trunk of document {} after one of its branches",
                        place(),
                        span.document
                    ),
                }
            }
        }
        Ok(())
    }
}

/// Tokens that every image needs for calls of their own to be worth it. Measured on one CPU core in f32 with nine
/// heads, 76 tokens of text around one image, forward / forward and backward, against one call with a mask: 64 tokens
/// -7% / -10%, 256 tokens -24% / -5%, 1024 tokens -24% / -11%.
const MIN_IMAGE_FOR_SEGMENTS: i64 = 64;

/// Part of every row that one attention call serves: queries `start..end` over keys `first_key..end`.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) start: i64,
    pub(crate) end: i64,
    /// 0, or where the window of the first query begins.
    pub(crate) first_key: i64,
    /// Which of the keys each query sees, `[end - start, end - first_key]` additive; none where it sees all of them, or
    /// where the segment is the first and causal.
    pub(crate) mask: Option<Tensor>,
    pub(crate) causal: bool,
}

/// The kernel that serves a batch.
#[derive(Debug)]
pub(crate) enum Kernel {
    /// One causal call without a mask.
    Causal,
    /// One call a segment, for rows that all have the same simple layout.
    Segments(Vec<Segment>),
    /// A plan a document, for each row in order: they see nothing of each other.
    Documents(Vec<Vec<AttentionPlan>>),
    /// One call with an additive mask `[batch, 1, seq, seq]`: 0 where seen, minus infinity elsewhere.
    Mask(Tensor),
}

/// Everything about a batch that its attention layers share; made once per batch.
#[derive(Debug)]
pub struct AttentionPlan {
    position_ids: Tensor, // [batch, seq]
    num_positions: i64,
    row_lens: Vec<i64>,
    cacheable: bool,
    spans: Spans,
    mode: VisionAttention,
    kind: Kind,
    pub(crate) kernel: Kernel,
}

/// Which kernel [`AttentionPlan::with_kernel`] is to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelChoice {
    /// A causal call without a mask, for rows of one text document.
    Causal,
    /// One call for each text and image span.
    Segments,
    /// For each document what it would take alone, for rows that hold several one behind the other.
    Documents,
    /// One call with a mask; serves everything.
    Mask,
}

impl AttentionPlan {
    /// Checks `spans` and plans for them: a plain causal call where nothing asks for more; on the CPU a call for each
    /// span where all rows have the same layout and their images are long, and each document for itself where rows are
    /// packed with several, so that time and memory grow as if each had a row of its own; else one mask for all layers.
    ///
    /// `kind` is that of the queries. Padding sees only padding, or, in a causal call, whatever came before it; its
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

    /// The same batch for layers with a sliding window: a token sees itself and the `window - 1` positions before it,
    /// nothing earlier. None where no row is long enough for that to hide anything.
    ///
    /// Positions are those of [`Span`], so a branch looks back along its own way. The tokens of an image that sees all
    /// of itself go on seeing all of each other, however large it is; text behind the image sees the part that its
    /// window reaches. HF combines Gemma 3's windows and images in the same way.
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
            !row.is_empty() && row.iter().all(|span| span.branch.is_none() && span.document == row[0].document)
        };
        Self {
            num_positions: tokens.positions.iter().max().map_or(0, |last| last + 1),
            position_ids: tokens.tensor(&tokens.positions, device),
            row_lens: spans.row_lens().collect(),
            cacheable: spans.rows.iter().all(single),
            spans: spans.clone(),
            mode,
            kind,
            kernel,
        }
    }

    /// The same plan once more.
    fn again(&self, device: Device) -> Self {
        Self::build(&self.spans, self.mode, device, self.kind, self.kernel_choice())
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

/// A mask reads and writes `seq^2` numbers that causal calls need not, so those come first; calls by segment follow
/// where every image is long. Of a packed row's mask most is minus infinity, so each document is served alone.
///
/// Not so on a GPU: a call costs the host more than its work costs the device. On an H200 the segments around one image
/// of 64 to 1024 tokens took 1.4 ms forward and backward, whatever its size, a causal call 0.25 ms; and a batch of 3,500
/// packed samples took 20 s a step.
fn choose(spans: &Spans, mode: VisionAttention, device: Device) -> KernelChoice {
    let is_packed = |row: &Vec<Span>| row.iter().any(|span| span.document != row[0].document);
    match Layout::of(spans, mode) {
        Some(layout) if layout.is_causal() => KernelChoice::Causal,
        _ if device != Device::Cpu => KernelChoice::Mask,
        Some(layout) if layout.min_image() >= MIN_IMAGE_FOR_SEGMENTS => KernelChoice::Segments,
        None if spans.rows.iter().any(is_packed) && documents(spans).is_some() => KernelChoice::Documents,
        _ => KernelChoice::Mask,
    }
}

/// The documents of each row, each as a batch of its own; none where a document is in pieces with another between.
fn documents(spans: &Spans) -> Option<Vec<Vec<Spans>>> {
    let of_row = |row: &Vec<Span>| {
        let documents: Vec<&[Span]> = row.chunk_by(|a, b| a.document == b.document).collect();
        let distinct: HashSet<i64> = documents.iter().map(|document| document[0].document).collect();
        let alone = |document: &[Span]| Spans { rows: vec![document.to_vec()] };
        (distinct.len() == documents.len()).then(|| documents.into_iter().map(alone).collect())
    };
    spans.rows.iter().map(of_row).collect()
}

/// The layout that all rows of a batch share: one document each, no branches, images at the same places; rows may
/// differ in the length of their last text, since padding after it is never seen by a token before it.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    parts: Vec<(i64, bool)>, // length, whether it is an image that sees all of itself
}

impl Layout {
    fn of(spans: &Spans, mode: VisionAttention) -> Option<Self> {
        let mut layouts = spans.rows.iter().map(|row| Self::of_row(row, mode));
        let first = layouts.next()??;
        layouts.try_fold(first, |layout, other| layout.join(other?))
    }

    fn of_row(row: &[Span], mode: VisionAttention) -> Option<Self> {
        let mut parts: Vec<(i64, bool)> = Vec::new();
        for span in row {
            if span.branch.is_some() || span.document != row[0].document {
                return None;
            }
            let whole = span.is_image() && mode.is_bidirectional();
            match parts.last_mut() {
                Some((len, false)) if !whole => *len += span.len,
                Some((len, true)) if whole && mode == VisionAttention::BidirectionalFused => *len += span.len,
                _ => parts.push((span.len, whole)),
            }
        }
        if parts.last().is_none_or(|(_, whole)| *whole) {
            parts.push((0, false)); // room for the padding of a row that ends in an image
        }
        Some(Self { parts })
    }

    /// The layout that serves rows of both, if there is one.
    fn join(mut self, other: Self) -> Option<Self> {
        let (last, leading) = self.parts.split_last_mut()?;
        let (other_last, other_leading) = other.parts.split_last()?;
        if leading != other_leading {
            return None;
        }
        last.0 = last.0.max(other_last.0);
        Some(self)
    }

    fn is_causal(&self) -> bool {
        self.parts.len() == 1
    }

    fn min_image(&self) -> i64 {
        self.parts.iter().filter(|(_, whole)| *whole).map(|(len, _)| *len).min().unwrap_or(0)
    }

    fn segments(&self, window: Option<i64>, device: Device, kind: Kind) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut start = 0;
        for &(len, whole) in self.parts.iter().filter(|(len, _)| *len > 0) {
            let part_end = start + len;
            let longest = window.filter(|_| !whole).unwrap_or(len);
            while start < part_end {
                let end = part_end.min(start + longest);
                segments.push(Segment::new(start, end, whole, window, device, kind));
                start = end;
            }
        }
        segments
    }
}

impl Segment {
    /// Queries `start..end`: text, no longer than the window, or a `whole` image.
    fn new(start: i64, end: i64, whole: bool, window: Option<i64>, device: Device, kind: Kind) -> Self {
        let first_key = window.map_or(0, |window| (start + 1 - window).max(0));
        let (len, before) = (end - start, start - first_key);
        let shape = [len, len + before];
        let ones = || Tensor::ones(shape, (Kind::Bool, device));
        // The first query sees all keys before the segment, the last may not.
        let passed = window.filter(|&window| before > 0 && end - first_key > window);
        let passed = passed.map(|window| {
            let passed = ones().tril(before - window);
            if whole {
                let _ = passed.narrow(1, before, len).fill_(0);
            }
            passed
        });
        // A causal call aligns queries with the first keys; text after other tokens needs them at the last.
        let later = (!whole && start > 0).then(|| ones().triu(before + 1));
        let unseen = match (later, passed) {
            (Some(later), Some(passed)) => Some(later.logical_or(&passed)),
            (later, passed) => later.or(passed),
        };
        let mask = unseen.map(|unseen| Tensor::zeros(shape, (kind, device)).masked_fill(&unseen, f64::NEG_INFINITY));
        Self { start, end, first_key, mask, causal: !whole && start == 0 }
    }
}

/// What each place of the batch, `[batch, seq]` flattened, belongs to; -1 stands for none.
#[derive(Debug)]
struct Tokens {
    shape: [i64; 2],
    positions: Vec<i64>,
    documents: Vec<i64>, // -1: padding
    branches: Vec<i64>,  // -1: the trunk
    images: Vec<i64>,    // the span that the block of a bidirectional image begins with; -1: not within one
}

impl Tokens {
    fn of(spans: &Spans, mode: VisionAttention) -> Self {
        let (batch, seq) = (spans.batch(), spans.seq());
        let size = (batch * seq) as usize;
        let mut tokens = Self {
            shape: [batch, seq],
            positions: Vec::with_capacity(size),
            documents: Vec::with_capacity(size),
            branches: Vec::with_capacity(size),
            images: Vec::with_capacity(size),
        };
        for (row_idx, row) in spans.rows.iter().enumerate() {
            let mut ends: HashMap<(i64, Option<i64>), i64> = HashMap::new();
            let mut last_images: HashMap<(i64, Option<i64>), i64> = HashMap::new(); // by the way they lie on
            for (span_idx, span) in row.iter().enumerate() {
                let trunk_end = ends.get(&(span.document, None)).copied().unwrap_or(0);
                let end = ends.entry((span.document, span.branch)).or_insert(trunk_end);
                tokens.positions.extend(*end..*end + span.len);
                *end += span.len;
                let image = if span.is_image() && mode.is_bidirectional() { span_idx as i64 } else { -1 };
                // An image on a branch stays apart from the trunk's, which sees no branch.
                let before = last_images.insert((span.document, span.branch), image).unwrap_or(-1);
                let fuses = mode == VisionAttention::BidirectionalFused && image >= 0 && before >= 0;
                let image = if fuses { before } else { image };
                last_images.insert((span.document, span.branch), image);
                tokens.fill(span, image);
            }
            let row_end = (row_idx + 1) * seq as usize;
            tokens.positions.resize(row_end, 0);
            tokens.documents.resize(row_end, -1);
            tokens.branches.resize(row_end, -1);
            tokens.images.resize(row_end, -1);
        }
        tokens
    }

    fn fill(&mut self, span: &Span, image: i64) {
        let end = self.documents.len() + span.len as usize;
        self.documents.resize(end, span.document);
        self.branches.resize(end, span.branch.unwrap_or(-1));
        self.images.resize(end, image);
    }

    fn tensor(&self, values: &[i64], device: Device) -> Tensor {
        Tensor::from_slice(values).view(self.shape).to_device(device)
    }

    /// `[batch, 1, seq, seq]`, additive
    fn mask(&self, window: Option<i64>, device: Device, kind: Kind) -> Tensor {
        let [batch, seq] = self.shape;
        let of_query = |values: &[i64]| self.tensor(values, device).view([batch, seq, 1]);
        let of_key = |values: &[i64]| self.tensor(values, device).view([batch, 1, seq]);
        let same = |values: &[i64]| of_query(values).eq_tensor(&of_key(values)); // [batch, seq, seq]
        let earlier = Tensor::ones([seq, seq], (Kind::Bool, device)).tril(0);
        let on_my_way = of_key(&self.branches).eq(-1).logical_or(&same(&self.branches));
        let same_image = same(&self.images).logical_and(&of_query(&self.images).ge(0));
        let mut behind = on_my_way.logical_and(&earlier); // [batch, seq, seq]
        if let Some(window) = window {
            behind = behind.logical_and(&(of_query(&self.positions) - of_key(&self.positions)).lt(window));
        }
        let seen = behind.logical_or(&same_image).logical_and(&same(&self.documents));
        Tensor::zeros([batch, seq, seq], (kind, device))
            .masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
            .unsqueeze(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Device, Kind) = (Device::Cpu, Kind::Float);

    fn plan(rows: Vec<Vec<Span>>, mode: VisionAttention) -> AttentionPlan {
        AttentionPlan::new(&Spans { rows }, mode, F32.0, F32.1).unwrap()
    }

    /// The rule of [`Span`], token by token; how far back a token looks is counted over the tokens on its way.
    fn reference(row: &[Span], mode: VisionAttention, window: usize, seq: usize) -> Vec<Vec<bool>> {
        let owner: Vec<usize> = row.iter().enumerate().flat_map(|(i, s)| vec![i; s.len as usize]).collect();
        let reaches = |q: usize, k: usize| {
            let (from, to) = (&row[owner[q]], &row[owner[k]]);
            from.document == to.document && k <= q && (to.branch.is_none() || to.branch == from.branch)
        };
        let fused = |a: usize, b: usize| {
            let way = |span: &Span| (span.document, span.branch);
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
            let spans = Spans { rows: rows.clone() };
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
    fn adjacent_images_fuse_where_it_is_asked_for() {
        let row = vec![Span::text(1), Span::image(1, 2), Span::image(1, 1), Span::text(1), Span::image(1, 1)];
        let seen = |mode| {
            let spans = Spans { rows: vec![row.clone()] };
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
        let (gpu, batch) = (Device::Cuda(0), |row| Spans { rows: vec![row] });
        assert_eq!(choose(&batch(vec![Span::text(5)]), Bidirectional, gpu), KernelChoice::Causal);
        assert_eq!(choose(&batch(vec![Span::text(2), long]), Bidirectional, gpu), KernelChoice::Mask);
        let packed = batch(vec![Span::text(2), Span::text(2).in_document(1)]);
        assert_eq!(choose(&packed, Causal, gpu), KernelChoice::Mask);
        let spans = Spans { rows: vec![vec![Span::image(1, 2)]] };
        let error = AttentionPlan::with_kernel(&spans, Bidirectional, F32.0, F32.1, KernelChoice::Causal).unwrap_err();
        assert!(error.to_string().contains("kernel Causal does not serve these spans"), "{error}");
    }

    #[test]
    fn a_window_that_hides_nothing_needs_no_plan_of_its_own() {
        let text = plan(vec![vec![Span::text(5)], vec![Span::text(3)]], VisionAttention::Bidirectional);
        assert!(text.within(5).is_none());
        let windowed = text.within(4).unwrap();
        assert_eq!((windowed.num_positions(), windowed.row_lens()), (5, &[5, 3][..]));
        // Two calls: the first four tokens, causal, and the fifth with the four that it sees.
        let Kernel::Segments(segments) = &windowed.kernel else { panic!("{:?}", windowed.kernel) };
        let parts: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.first_key, s.causal)).collect();
        assert_eq!(parts, [(0, 4, 0, true), (4, 5, 1, false)]);
        assert!(segments[0].mask.is_none());
    }

    #[test]
    fn counts_and_places() {
        let spans =
            Spans { rows: vec![vec![Span::text(1), Span::image(1, 2)], vec![Span::image(1, 1), Span::text(4)]] };
        assert_eq!((spans.batch(), spans.seq(), spans.num_tokens()), (2, 5, 8));
        assert_eq!(spans.image_positions(), [1, 2, 5]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = Span { len: 5, ..Span::image(2, 3) };
        for (rows, says) in [
            (vec![], "a batch of no rows"),
            (vec![vec![]], "a batch of no tokens"),
            (vec![vec![Span::text(1), Span::text(0)]], "row 0, span 1: length is 0"),
            (vec![vec![Span::text(-3)], vec![Span::text(4)]], "row 0, span 0: length is -3"),
            (vec![vec![wrong]], "row 0, span 0: length is 5, its image has 2 rows of 3"),
            (vec![vec![Span::text(1).in_document(-1)]], "document is -1"),
            (vec![vec![Span::text(1).on_branch(-1)]], "branch is -1"),
            (vec![vec![Span::text(1), Span::text(1).on_branch(0), Span::text(1)]], "trunk of document 0 after"),
        ] {
            let error = AttentionPlan::new(&Spans { rows }, VisionAttention::Causal, F32.0, F32.1).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
