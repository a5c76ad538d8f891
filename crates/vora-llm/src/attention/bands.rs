//! The keys that every query of a batch attends to, out of its spans.

use std::collections::HashMap;
use std::ops::Range;

use vora_text::{Span, Spans};
use vora_torch::nn::attention::{Band, Bands, Run};

use super::mode::VisionAttention;

/// A document and a branch of it.
type Way = (Option<i64>, Option<i64>);

/// Tokens of one row that stand together, on one way of one document.
#[derive(Debug, Clone)]
struct Part {
    document: Option<i64>, // none: what all begin with
    branch: Option<i64>,
    places: Range<i64>,
    position: i64,        // of its first token
    block: Option<usize>, // the part that its bidirectional block begins with
}

impl Part {
    fn is_on(&self, way: Way) -> bool {
        (self.document, self.branch) == way
    }

    /// What to add to a place for its position.
    fn offset(&self) -> i64 {
        self.position - self.places.start
    }
}

/// The rule of [`Span`] as bands; with a `window`, layers that slide.
pub(super) fn bands(spans: &Spans, mode: VisionAttention, window: Option<i64>) -> Bands {
    let rows: Vec<Vec<Run>> = spans.rows().iter().map(|row| runs(&parts(row, mode), window)).collect();
    Bands::new(&rows).expect("parts follow each other")
}

/// The parts of a row; text goes on in the part before it where nothing else lies between.
fn parts(row: &[Span], mode: VisionAttention) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut last: HashMap<Way, usize> = HashMap::new(); // the last part of a way
    let mut place = 0;
    for span in row {
        let way = (span.document(), span.branch());
        let ways = [way, (span.document(), None), (None, None)];
        let before = ways.iter().find_map(|way| last.get(way)).map(|&i| &parts[i]);
        let position = before.map_or(0, |part| part.position + part.places.end - part.places.start);
        let own = last.get(&way).copied();
        let whole = span.is_image() && mode.is_bidirectional();
        let fused = own.and_then(|i| parts[i].block).filter(|_| mode == VisionAttention::BidirectionalFused);
        let places = place..place + span.len();
        place = places.end;
        match parts.last_mut() {
            Some(part) if !whole && part.is_on(way) && part.block.is_none() => part.places.end = places.end,
            _ => {
                let block = whole.then(|| fused.unwrap_or(parts.len()));
                last.insert(way, parts.len());
                parts.push(Part { document: span.document(), branch: span.branch(), places, position, block });
            }
        }
    }
    parts
}

fn runs(parts: &[Part], window: Option<i64>) -> Vec<Run> {
    let run = |(idx, part): (usize, &Part)| {
        let is_seen = |other: &Part| {
            let is_mine = other.document.is_none() || other.document == part.document;
            is_mine && (other.branch.is_none() || other.branch == part.branch)
        };
        let mut bands = Vec::new();
        for (other_idx, other) in parts.iter().enumerate().filter(|(_, other)| is_seen(other)) {
            let keys = other.places.clone();
            let band = match (part.block, other.block) {
                (Some(own), Some(block)) if own == block => {
                    bands.push(Band::all(keys));
                    continue;
                }
                _ if other_idx < idx => Band::all(keys),
                _ if other_idx == idx => Band::causal(keys),
                _ => continue,
            };
            // Positions less than `window` apart; a place and its position differ by the same throughout a part.
            bands.push(match window {
                Some(window) => band.from(part.offset() - other.offset() + 1 - window),
                None => band,
            });
        }
        Run { queries: part.places.clone(), bands }
    };
    parts.iter().enumerate().map(run).collect()
}
