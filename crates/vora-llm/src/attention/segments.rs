//! A layout that all rows of a batch share, and the attention calls that serve it one part after the other.

use tch::{Device, Kind, Tensor};
use vora_text::{Span, Spans};

use super::mode::VisionAttention;

/// Part of every row that one attention call serves: queries `start..end` over keys `first_key..end`.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) start: i64,
    pub(super) end: i64,
    /// 0, or where the window of the first query begins.
    pub(super) first_key: i64,
    /// Which of the keys each query attends to, `[end - start, end - first_key]` additive; none where all of them, or
    /// where the segment is the first and causal.
    pub(super) mask: Option<Tensor>,
    pub(super) causal: bool,
}

/// The layout that all rows of a batch share: one document each, no branches, images at the same places; rows may
/// differ in the length of their last text, since no token attends to the padding after it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    parts: Vec<(i64, bool)>, // length, whether it is an image whose tokens attend to all of each other
}

impl Layout {
    pub(super) fn of(spans: &Spans, mode: VisionAttention) -> Option<Self> {
        let mut layouts = spans.rows().iter().map(|row| Self::of_row(row, mode));
        let first = layouts.next()??;
        layouts.try_fold(first, |layout, other| layout.join(other?))
    }

    fn of_row(row: &[Span], mode: VisionAttention) -> Option<Self> {
        let mut parts: Vec<(i64, bool)> = Vec::new();
        for span in row {
            if span.branch().is_some() || span.document() != row[0].document() {
                return None;
            }
            let whole = span.is_image() && mode.is_bidirectional();
            match parts.last_mut() {
                Some((len, false)) if !whole => *len += span.len(),
                Some((len, true)) if whole && mode == VisionAttention::BidirectionalFused => *len += span.len(),
                _ => parts.push((span.len(), whole)),
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

    pub(super) fn is_causal(&self) -> bool {
        self.parts.len() == 1
    }

    pub(super) fn segments(&self, window: Option<i64>, device: Device, kind: Kind) -> Vec<Segment> {
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
        // The first query attends to all keys before the segment, the last may not.
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
