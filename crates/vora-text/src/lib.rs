//! Text on its way to a model and back: a checkpoint's tokenizer, its chat template as Hugging Face renders it, and
//! [`Spans`], which say what the tokens of a row are. A GGUF file serves where HF's JSON files are absent. It computes
//! nothing, knows no pixels, and links no libtorch.
//!
//! ```
//! use vora_text::{Span, Spans};
//!
//! // Two words, an image of two by two patches, one word.
//! let spans = Spans::new(vec![vec![Span::text(2), Span::image(2, 2), Span::text(1)]]);
//! assert_eq!((spans.num_tokens(), spans.image_positions()), (7, vec![2, 3, 4, 5]));
//! ```

mod added_tokens;
mod chat;
mod class_parts;
mod error;
mod spans;
mod specials;
mod stream;
mod token_bytes;
mod tokenizer;
mod tokenizer_class;

pub use added_tokens::{special_tokens, special_tokens_by_class};
pub use chat::{ChatTemplate, Message, Part, Piece};
pub use error::TextError;
pub use spans::{Modality, Span, Spans};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        fixtures::root().join("golden").join(name)
    }

    #[test]
    fn pieces_of_a_gguf_file_are_sentencepieces() {
        let tokenizer = Tokenizer::open(&golden("sentencepiece.gguf")).unwrap();
        let cases: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden("sentencepiece.json")).unwrap()).unwrap();
        let cases = cases["texts"].as_array().unwrap();
        assert_eq!(cases.len(), 10);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<i64> = serde_json::from_value(case["ids"].clone()).unwrap();
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(ids, expected, "{text}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    #[test]
    fn a_gguf_file_alone_has_a_tokenizer_and_a_chat_template() {
        let path = golden("gguf_file.gguf");
        let tokenizer = Tokenizer::open(&path).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (19, &[2][..]));
        let ids = tokenizer.encode("hello 12").unwrap();
        assert_eq!(ids, [17, 10, 7, 8]); // hello, a space, and each digit by itself, as SmolLM has it
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "hello 12");
        assert_eq!(tokenizer.encode_template("<|im_end|>").unwrap(), [2]);
        let chat = ChatTemplate::open(&path).unwrap();
        assert_eq!(chat.render(&[Message::new("user", "hello")], true).unwrap(), "hello");

        let bare = golden("gguf_qwen3.gguf");
        let error = format!("{:#}", Tokenizer::open(&bare).unwrap_err());
        assert!(error.contains("gguf_qwen3.gguf: there is no metadata `tokenizer.ggml.model`"), "{error}");
    }

    #[test]
    fn files_beside_it_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let copy = |from: PathBuf, to: &str| std::fs::copy(from, folder.path().join(to)).unwrap();
        copy(golden("gguf_qwen3.gguf"), "model.gguf"); // it has no tokenizer
        let tiny = fixtures::root().join("tiny/tokenizer");
        copy(tiny.join("tokenizer.json"), "tokenizer.json");
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (512, &[2][..])); // the model's config names the end
        let error = ChatTemplate::open(folder.path()).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&TextError::NoChatTemplate(folder.path().to_owned())), "{error:#}");
        copy(tiny.join("chat_template.jinja"), "chat_template.jinja");
        ChatTemplate::open(folder.path()).unwrap();
    }

    #[test]
    fn a_template_without_an_end_is_told_from_one_that_refuses() {
        let error = |source: &str| {
            let chat = ChatTemplate::new(source, Vec::new(), "test").unwrap();
            chat.render(&[Message::new("user", "hello")], true).unwrap_err()
        };
        let endless = error("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}");
        assert_eq!(endless.downcast_ref(), Some(&TextError::OutOfFuel { origin: "test".to_owned() }), "{endless:#}");
        let refusing = error("{{ raise_exception('no') }}");
        let Some(TextError::Template { origin, problem }) = refusing.downcast_ref() else { panic!("{refusing:#}") };
        assert!(origin == "test" && problem.contains("no"), "{problem}");
    }
}
