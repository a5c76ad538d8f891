//! The bytes of one token, which need not be whole characters.

use tokenizers::DecoderWrapper;

use crate::specials::ACTIVE;
use crate::tokenizer::Tokenizer;

impl Tokenizer {
    /// What a token stands for in a text: the literal of a special one, else its bytes, a leading space among them. Empty for an
    /// id without a token.
    pub fn token_bytes(&self, id: i64) -> Vec<u8> {
        let name = u32::try_from(id).ok().filter(|&id| !self.is_image(id)).and_then(|id| self.inner().id_to_token(id));
        let Some(name) = name else { return Vec::new() };
        if self.is_added(id) {
            return self.specials().restore(&name, ACTIVE).into_owned().into_bytes();
        }
        if is_byte_level(self.inner().get_decoder()) {
            return name.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| name.into_bytes());
        }
        let hex = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => vec![byte],
            None => name.replace('\u{2581}', " ").into_bytes(),
        }
    }
}

/// Whether a token's characters stand for bytes, as in GPT-2.
fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(several)) => several.get_decoders().iter().any(|one| is_byte_level(Some(one))),
        _ => false,
    }
}

/// GPT-2's table the other way round: printable bytes stand for themselves, the others for what follows U+0100, in order.
fn byte_of(character: char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => is_printable(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|&byte| !is_printable(byte)).nth((code - 256) as usize),
    }
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::tests::{llama2, tiny};

    /// The bytes of its tokens, one after the other, are the text, whichever kind of tokenizer it is.
    #[test]
    fn bytes_of_all_tokens_are_the_text() {
        let text = "Is it 🙂 日本語?\n naïve — yes\u{1}\u{7f}.";
        for (tokenizer, before) in [(tiny(), ""), (llama2(), " ")] {
            let ids = tokenizer.encode(text).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), format!("{before}{text}"));
            assert!(
                ids.iter().any(|&id| std::str::from_utf8(&tokenizer.token_bytes(id)).is_err()),
                "parts of characters"
            );
        }
        let tokenizer = tiny();
        let end = tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(tokenizer.token_bytes(end), b"<|im_end|>");
        assert_eq!((tokenizer.token_bytes(-1), tokenizer.token_bytes(1 << 40)), (Vec::new(), Vec::new()));
        assert_eq!(tokenizer.token_bytes(tokenizer.image_token_id("<no such token>")), Vec::<u8>::new());
    }
}
