//! Ids to text one by one, as a model writes them.

use anyhow::Result;

use crate::tokenizer::Tokenizer;

/// Text that grows with every id, as it is generated: a piece comes out as soon as it is certain, so a character that
/// several tokens make up comes whole. The pieces, with what [`TokenStream::finish`] gives, are the decoded whole.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<i64>, // the last piece's, for what a token looks like depends on the one before; then those not yet out
    read: usize,   // how many of `ids` are out
    shown: String, // text of ids[..read]
}

impl Tokenizer {
    /// A decoder that takes ids one by one; see [`TokenStream`].
    pub fn stream(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream { tokenizer: self, skip_special, ids: Vec::new(), read: 0, shown: String::new() }
    }
}

/// A character is at most four bytes, so at most four tokens; what is still broken after that stays so.
const MAX_TOKENS_OF_A_CHAR: usize = 4;

impl TokenStream<'_> {
    /// Takes the next id; the new text, where there is some.
    ///
    /// # Errors
    /// See [`Tokenizer::decode`].
    pub fn push(&mut self, id: i64) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let broken = text.ends_with('\u{fffd}') && self.ids.len() - self.read < MAX_TOKENS_OF_A_CHAR;
        if broken || text.len() <= self.shown.len() {
            return Ok(None);
        }
        let piece = new_text(&self.shown, &text);
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        self.shown = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(Some(piece))
    }

    /// The text that was still waiting for more.
    ///
    /// # Errors
    /// See [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        Ok(new_text(&self.shown, &self.tokenizer.decode(&self.ids, self.skip_special)?))
    }
}

/// What `text` has beyond `shown`, its start unless bytes that are no text changed their looks.
fn new_text(shown: &str, text: &str) -> String {
    let common = shown.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    text[common..].to_owned()
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::tests::{llama2, tiny};

    #[test]
    fn a_stream_gives_whole_characters_and_the_whole_text() {
        let text = "Is it 🙂👩‍👩‍👧 日本語? naïve — yes.<|im_end|>\n";
        for tokenizer in [tiny(), llama2()] {
            for skip_special in [false, true] {
                let ids = tokenizer.encode_template(text).unwrap();
                let mut stream = tokenizer.stream(skip_special);
                let mut pieces = Vec::new();
                for &id in &ids {
                    pieces.extend(stream.push(id).unwrap());
                }
                assert!(pieces.len() > 10 && pieces.iter().all(|p| !p.contains('\u{fffd}') && !p.is_empty()));
                let all = pieces.concat() + &stream.finish().unwrap();
                assert_eq!(all, tokenizer.decode(&ids, skip_special).unwrap());
            }
        }
    }

    #[test]
    fn a_stream_of_broken_characters_goes_on() {
        let tokenizer = tiny();
        let smile = tokenizer.encode("🙂").unwrap();
        assert!(smile.len() > 1, "the tiny vocabulary has no smile");
        let mut stream = tokenizer.stream(true);
        assert_eq!(stream.push(smile[0]).unwrap(), None);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
        let mut stream = tokenizer.stream(true);
        let pushed: Vec<_> = (0..20).filter_map(|_| stream.push(smile[0]).unwrap()).collect();
        assert!(pushed.len() >= 4, "{pushed:?}");
    }
}
