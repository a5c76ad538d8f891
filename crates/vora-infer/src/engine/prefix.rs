//! What a prompt begins with, as keys of the cache's pages.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash, Hasher};

use vora_image::Pixels;
use vora_text::{Modality, Span};
use vora_torch::nn::decode::LoraId;

/// What a page holds, and all that comes before it. Two that are equal hold the same, but for one chance in 2^128 that no
/// request can look for: the engine drew the hash function when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PageKey(pub(super) [u64; 2]);

/// Makes keys; an engine has one of its own.
#[derive(Debug, Default)]
pub(super) struct Keys([RandomState; 2]);

/// A token as it enters the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum TokenKey {
    /// A word's.
    Word(i64),
    /// Which one, of pictures whose tokens may see each other: they stand for their tokens all together.
    Patch(PageKey, i64),
}

/// Which adapter acts on the tokens of a sequence, where that does not follow from the tokens themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AdapterKey {
    /// This one, or none, on all.
    Whole(LoraId),
    /// This one on the pictures'.
    Pictures(LoraId),
}

impl Keys {
    fn of(&self, content: &impl Hash) -> PageKey {
        PageKey(self.0.each_ref().map(|state| state.hash_one(content)))
    }

    /// What the tokens of one prompt are: its ids and spans, its pictures, and which tokens see each other.
    ///
    /// `fused` is whether pictures that stand side by side see each other as well.
    pub(super) fn tokens(&self, ids: &[i64], spans: &[Span], pictures: &[Pixels], fused: bool) -> Vec<TokenKey> {
        let mut of_pictures = pictures.iter().map(|picture| self.of_picture(picture));
        let mut tokens = Vec::with_capacity(ids.len());
        let mut rest = spans;
        while let Some((first, mut after)) = rest.split_first() {
            if let Modality::Text = first.modality() {
                let start = tokens.len();
                tokens.extend(ids[start..start + first.len() as usize].iter().map(|&id| TokenKey::Word(id)));
            } else {
                let others = if fused { after.iter().take_while(|span| span.is_image()).count() } else { 0 };
                let mut block = vec![(grid(first), of_pictures.next())];
                block.extend(after[..others].iter().map(|span| (grid(span), of_pictures.next())));
                let len: i64 = first.len() + after[..others].iter().map(Span::len).sum::<i64>();
                let block = self.of(&block);
                tokens.extend((0..len).map(|i| TokenKey::Patch(block, i)));
                after = &after[others..];
            }
            rest = after;
        }
        tokens
    }

    /// The keys of all whole pages of a sequence.
    pub(super) fn pages(&self, adapter: AdapterKey, tokens: &[TokenKey], page_len: usize) -> Vec<PageKey> {
        let mut before = self.of(&adapter);
        let page = |tokens: &[TokenKey]| {
            before = self.of(&(before, tokens));
            before
        };
        tokens.chunks_exact(page_len).map(page).collect()
    }

    fn of_picture(&self, picture: &Pixels) -> PageKey {
        PageKey(self.0.each_ref().map(|state| {
            let mut hasher = state.build_hasher();
            (picture.height, picture.width).hash(&mut hasher);
            picture.data.iter().for_each(|value| hasher.write_u32(value.to_bits()));
            hasher.finish()
        }))
    }
}

/// Rows and columns of a picture's tokens.
fn grid(span: &Span) -> (i64, i64) {
    match span.modality() {
        Modality::Image { rows, cols } => (rows, cols),
        Modality::Text => (1, span.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(value: f32) -> Pixels {
        Pixels { data: vec![value; 12], height: 2, width: 2 }
    }

    #[test]
    fn keys_differ_from_where_the_prompts_do() {
        let keys = Keys::default();
        let spans = [Span::text(2), Span::image(1, 2), Span::image(2, 1), Span::text(2)];
        let whole = |adapter| AdapterKey::Whole(LoraId::named(adapter).unwrap());
        let of = |ids: [i64; 8], pictures: [f32; 2], adapter, fused| {
            let tokens = keys.tokens(&ids, &spans, &pictures.map(picture), fused);
            assert_eq!(tokens.len(), 8);
            keys.pages(whole(adapter), &tokens, 2)
        };
        let ids = [5, 6, 0, 0, 0, 0, 7, 8];
        let common = |a: &[PageKey], b: &[PageKey]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let first = of(ids, [0.0, 1.0], 1, false);
        assert_eq!(common(&first, &of(ids, [0.0, 1.0], 1, false)), 4);
        assert_eq!(
            common(&first, &of([5, 6, 9, 9, 9, 9, 7, 8], [0.0, 1.0], 1, false)),
            4,
            "ids of places are not read"
        );
        assert_eq!(common(&first, &of([5, 6, 0, 0, 0, 0, 7, 9], [0.0, 1.0], 1, false)), 3);
        assert_eq!(common(&first, &of(ids, [0.0, 2.0], 1, false)), 2);
        assert_eq!(common(&of(ids, [0.0, 1.0], 1, true), &of(ids, [0.0, 2.0], 1, true)), 1, "they see each other");
        assert_eq!(common(&first, &of(ids, [0.0, 1.0], 0, false)), 0);
        let pictures = AdapterKey::Pictures(LoraId::named(1).unwrap());
        let tokens = keys.tokens(&ids, &spans, &[picture(0.0), picture(1.0)], false);
        assert_eq!(common(&first, &keys.pages(pictures, &tokens, 2)), 0);
        assert_eq!(common(&first, &Keys::default().pages(whole(1), &keys.tokens(&ids, &spans, &[], false), 2)), 0);
    }
}
