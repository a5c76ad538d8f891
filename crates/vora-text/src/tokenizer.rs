//! Text to ids and back, over a checkpoint's `tokenizer.json`.
//!
//! Special tokens are inert in text: in this tokenizer they go by private names, single characters of Unicode's last
//! plane, that only [`Tokenizer::encode_template`] and a chat template's own words are turned into. So `<|im_end|>`
//! in somebody's message is nine letters, whatever the model.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper};
use vora_files::tell_once;
use vora_gguf::folder::{open_json, read_json};

use crate::added_tokens::AddedTokens;
use crate::error::TextError;
use crate::specials::{ACTIVE, BEFORE, IMAGE, INERT, Specials, mark, unmark, without_reserved};

/// A checkpoint's tokenizer. It adds no tokens on its own but in [`Tokenizer::encode_whole`] and, once it is
/// [`for_processor`](Tokenizer::for_processor), around conversations: what stands at the start or end of a sequence is
/// otherwise the chat template's business, or the caller's.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    specials: Specials,
    image_id: u32,
    around: Around,
    bos: Option<String>, // by its private name
    for_processor: bool,
    eos_ids: Vec<i64>,
    embedding_rows: Option<i64>, // of the model that the ids are for, where that is known
    begins_with_space: bool,     // it puts a space before what it encodes, as SentencePiece's models do
}

/// The tokens that a tokenizer's post-processor puts around a text.
#[derive(Debug, Default)]
struct Around {
    before: Vec<i64>,
    after: Vec<i64>,
}

impl Around {
    fn of(post_processor: &Value) -> Result<Self> {
        const TEXT: u32 = u32::MAX;
        if post_processor.is_null() {
            return Ok(Self::default());
        }
        let processor: PostProcessorWrapper = serde_json::from_value(post_processor.clone())?;
        let text = Encoding::from_tokens(vec![tokenizers::Token::new(TEXT, String::new(), (0, 0))], 0);
        let whole = processor.process(text, None, true).map_err(|e| anyhow!(e))?;
        let mut parts = whole.get_ids().split(|&id| id == TEXT);
        let mut next = || parts.next().map(|ids| ids.iter().map(|&id| i64::from(id)).collect());
        match (next(), next(), next()) {
            (Some(before), Some(after), None) => Ok(Self { before, after }),
            _ => bail!("its template has the text not just once"),
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder, and from the files beside it the tokens that it lacks and those
    /// that end a sequence; or all of it from the metadata of a GGUF file: `path` is one, or a folder with one and no
    /// such files.
    ///
    /// # Errors
    /// Names the file that cannot be read, or is no tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        let (mut json, origin) = open_json(path, "tokenizer.json")?;
        let added = AddedTokens::open(path)?;
        let parse = |json: &mut Value| {
            added.add_to(json)?;
            let remark = added.class.remark(&origin, json)?;
            let tokenizer = Self::parse(json.take())?;
            if let Some(remark) = remark {
                tell_once(remark);
            }
            anyhow::Ok(tokenizer)
        };
        let mut tokenizer = parse(&mut json).with_context(|| format!("reading {}", origin.display()))?;
        let named = added.named();
        let token = |name: &str| named.iter().find_map(|(key, token)| (key == name).then_some(token.as_str()));
        tokenizer.bos = token("bos_token").map(|token| tokenizer.name(token).into_owned());
        tokenizer.eos_ids = eos_ids(path, token("eos_token").and_then(|token| tokenizer.token_to_id(token)))?;
        Ok(tokenizer)
    }

    fn parse(mut json: Value) -> Result<Self> {
        ensure!(json["model"].is_object(), "no object `model`: not the file of a tokenizer");
        let mut ids = Vec::new(); // of every added token, under the name it will have
        let mut literals = Vec::new();
        let added = json.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
        for token in &added {
            let content = token["content"].as_str().context("`added_tokens` has an entry without `content`")?;
            let id = token["id"].as_u64().with_context(|| format!("added token `{content}` has no `id`"))?;
            let special = token["special"].as_bool().unwrap_or(false) && !content.is_empty();
            let name = if special {
                literals.push(content.to_owned());
                mark(ACTIVE, literals.len() - 1)?.to_string()
            } else {
                content.to_owned()
            };
            ids.push((name, id));
        }
        let around = Around::of(&json["post_processor"]).context("post_processor");
        let around = around.map_err(|error| by_part(error, &json))?;
        let specials = Specials::new(literals);
        specials.rename(&mut json);
        let begins_with_space = begins_with_space(&json);

        // Back to text, which the library's own parser wants.
        let inner =
            tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&json)?).map_err(|e| by_part(anyhow!(e), &json))?;
        for (name, id) in ids {
            let found = inner.token_to_id(&name).map(u64::from);
            ensure!(
                found == Some(id) || name.is_empty(),
                "added token `{}` has id {id}, but comes to {found:?} after the vocabulary",
                specials.restore(&name, ACTIVE)
            );
        }
        let image_id = inner.token_to_id(&IMAGE.to_string()).context("no room for the image's place")?;
        Ok(Self {
            inner,
            specials,
            image_id,
            around,
            bos: None,
            for_processor: false,
            eos_ids: Vec::new(),
            embedding_rows: None,
            begins_with_space,
        })
    }

    /// The same tokenizer for a model whose conversations come through one of HF's processors, as LLaVA's do: they get
    /// the post-processor's tokens around them, unless they begin with `bos_token` already.
    #[must_use]
    pub fn for_processor(mut self, for_processor: bool) -> Self {
        self.for_processor = for_processor;
        self
    }

    /// The same tokenizer for a model whose embedding has `rows` rows: where a text comes to a token beyond them,
    /// encoding it is an error.
    #[must_use]
    pub fn for_embedding(mut self, rows: i64) -> Self {
        self.embedding_rows = Some(rows);
        self
    }

    /// An error that names the first of `ids` that lies beyond the model's embedding, and both sizes.
    fn check_rows(&self, mut ids: impl Iterator<Item = i64>) -> Result<()> {
        let Some(rows) = self.embedding_rows else { return Ok(()) };
        let Some(id) = ids.find(|&id| id >= rows) else { return Ok(()) };
        let token = u32::try_from(id).ok().and_then(|id| self.inner.id_to_token(id)).unwrap_or_default();
        let token = self.specials.restore(&token, ACTIVE).into_owned();
        Err(TextError::BeyondEmbedding { token, id, rows, vocab_size: self.vocab_size() }.into())
    }

    /// The ids of plain text; the literal of a special token is text like any other. No token is added.
    ///
    /// # Errors
    /// [`TextError::BeyondEmbedding`] of a token that the model's embedding has no row for, where its rows are known.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        self.ids(&without_reserved(text))
    }

    /// The ids of a text that is whole, with the tokens that the post-processor puts around it (`<s>`, where it is
    /// Llama's): HF's `tokenizer(text)`. The literal of a special token is text like any other.
    ///
    /// # Errors
    /// See [`encode`](Self::encode).
    pub fn encode_whole(&self, text: &str) -> Result<Vec<i64>> {
        let ids = [self.around.before.clone(), self.encode(text)?, self.around.after.clone()].concat();
        self.check_rows(ids.iter().copied())?;
        Ok(ids)
    }

    /// The ids of text in which the literals of special tokens stand for these tokens, as a template's author means
    /// them; never for text that comes from a user. No token is added.
    ///
    /// # Errors
    /// See [`encode`](Self::encode).
    pub fn encode_template(&self, text: &str) -> Result<Vec<i64>> {
        self.ids(&self.specials.replace(&without_reserved(text), ACTIVE))
    }

    /// The text of `ids`; special tokens are left out or shown as their literals. An id without a token is left out:
    /// a model's embedding may have more rows than there are tokens.
    ///
    /// # Errors
    /// What the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String> {
        let ids = ids.iter().filter_map(|&id| u32::try_from(id).ok()).filter(|&id| id != self.image_id);
        let ids: Vec<u32> = ids.collect();
        let text = self.inner.decode(&ids, skip_special).map_err(|e| anyhow!("decoding: {e}"))?;
        Ok(self.specials.restore(&text, ACTIVE).into_owned())
    }

    /// The id of one token by its literal, special or not.
    pub fn token_to_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(&self.name(token)).map(i64::from)
    }

    /// The id of what stands for a picture, `image_token`: its own where it is a token, else the one that HF's tokenizer
    /// gives the next token that is added to it.
    pub fn image_token_id(&self, image_token: &str) -> i64 {
        self.token_to_id(image_token).unwrap_or(i64::from(self.image_id))
    }

    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    pub(crate) fn specials(&self) -> &Specials {
        &self.specials
    }

    /// Whether the id is what stands for a picture.
    pub(crate) fn is_image(&self, id: u32) -> bool {
        id == self.image_id
    }

    /// Whether a text never has the token, as one that begins or ends a turn.
    pub fn is_special_id(&self, id: i64) -> bool {
        let added =
            u32::try_from(id).ok().and_then(|id| self.inner.get_added_tokens_decoder().get(&id).map(|t| t.special));
        added.unwrap_or(false)
    }

    /// Whether the token was added to the vocabulary, and stands for itself.
    pub(crate) fn is_added(&self, id: i64) -> bool {
        u32::try_from(id).is_ok_and(|id| self.inner.get_added_tokens_decoder().contains_key(&id))
    }

    /// The name that a token goes by here.
    fn name<'a>(&self, token: &'a str) -> Cow<'a, str> {
        match self.specials.name(token) {
            Some(mark) => mark.to_string().into(),
            None => without_reserved(token),
        }
    }

    /// The tokens that end a sequence: those of `generation_config.json` (or `config.json`) and the `eos_token` of
    /// `tokenizer_config.json`.
    pub fn eos_ids(&self) -> &[i64] {
        &self.eos_ids
    }

    /// Number of ids, added tokens included; a model's embedding may have more rows.
    pub fn vocab_size(&self) -> i64 {
        self.inner.get_vocab_size(true) as i64 - 1 // without the image's place
    }

    fn ids(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| anyhow!("encoding text: {e}"))?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        self.check_rows(ids.iter().copied())?;
        Ok(ids)
    }

    /// Somebody's text on its way into a chat template: literals of special tokens are hidden until it is rendered.
    pub(crate) fn protect(&self, text: &str) -> String {
        self.specials.replace(&without_reserved(text), INERT).into_owned()
    }

    /// What a chat template rendered from protected texts, with its own special tokens under their private names.
    pub(crate) fn activate(&self, rendered: &str) -> String {
        self.specials.replace(rendered, ACTIVE).into_owned()
    }

    /// Undoes [`Tokenizer::protect`].
    pub(crate) fn unprotect<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.specials.restore(text, INERT)
    }

    /// Whether a character of an activated text is a special token.
    pub(crate) fn is_special(&self, c: char) -> bool {
        unmark(c, ACTIVE).is_some()
    }

    /// The tokens of an activated and unprotected text.
    pub(crate) fn encode_activated(&self, text: &str) -> Result<Vec<Token>> {
        let encoding = self.inner.encode(text, false).map_err(|e| anyhow!("encoding a conversation: {e}"))?;
        let ids = encoding.get_ids().iter().map(|&id| (id != self.image_id).then_some(i64::from(id)));
        self.check_rows(ids.clone().flatten())?;
        Ok(ids.zip(encoding.get_offsets()).map(|(id, &(start, end))| Token { id, start, end }).collect())
    }

    /// The tokens that go before and after those of a whole conversation, activated and unprotected.
    pub(crate) fn around(&self, conversation: &str) -> Result<[Vec<Token>; 2]> {
        let begins = self.bos.as_ref().is_some_and(|bos| conversation.starts_with(bos));
        if !self.for_processor || begins {
            return Ok([Vec::new(), Vec::new()]);
        }
        let Around { before, after } = &self.around;
        self.check_rows(before.iter().chain(after).copied())?;
        let tokens = |ids: &[i64], at| ids.iter().map(|&id| Token { id: Some(id), start: at, end: at }).collect();
        Ok([tokens(before, 0), tokens(after, conversation.len())])
    }

    /// The tokens of an activated and unprotected text that goes on after another one: what a model writes after a
    /// prompt. None of them reaches back into the prompt.
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Vec<Token>> {
        if !self.begins_with_space {
            return self.encode_activated(text);
        }
        // The space goes before a character that no token joins with another one; all of it is left out.
        let tokens = self.encode_activated(&format!("{BEFORE}{text}"))?;
        let begin = BEFORE.len_utf8();
        if tokens.iter().any(|token| token.start < begin && begin < token.end) {
            return self.encode_activated(text);
        }
        let after = tokens.into_iter().filter(|token| token.end > begin);
        Ok(after.map(|token| Token { start: token.start - begin, end: token.end - begin, ..token }).collect())
    }
}

/// Whether a `tokenizer.json` puts a space before every text.
fn begins_with_space(json: &Value) -> bool {
    let steps = |key: &str, list: &str| -> Vec<Value> {
        let step = &json[key];
        step[list].as_array().cloned().unwrap_or_else(|| vec![step.clone()])
    };
    let normalizers = steps("normalizer", "normalizers");
    let pre_tokenizers = steps("pre_tokenizer", "pretokenizers");
    normalizers.iter().any(|step| step["type"] == "Prepend")
        || pre_tokenizers.iter().any(|step| match step["type"].as_str() {
            Some("Metaspace") => step["prepend_scheme"] != "never" && step["add_prefix_space"] != false,
            Some("ByteLevel") => step["add_prefix_space"] == true,
            _ => false,
        })
}

/// A token and the bytes of the text that it stands for.
pub(crate) struct Token {
    /// None for the place of an image.
    pub(crate) id: Option<i64>,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// The ids in the config files, and `named`, that of `eos_token`.
fn eos_ids(path: &Path, named: Option<i64>) -> Result<Vec<i64>> {
    let ids = |file| -> Result<Vec<i64>> {
        let value = read_json::<Value>(path, file)?["eos_token_id"].take();
        Ok(match value {
            Value::Array(ids) => ids.iter().filter_map(Value::as_i64).collect(),
            id => id.as_i64().into_iter().collect(),
        })
    };
    let mut found = ids("generation_config.json")?;
    if found.is_empty() {
        found = ids("config.json")?;
    }
    found.extend(named);
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Parts of `tokenizer.json`, by what the library calls the types that it reads them into.
const PARTS: [(&str, &str); 6] = [
    ("ModelUntagged", "model"),
    ("NormalizerUntagged", "normalizer"),
    ("PreTokenizerUntagged", "pre_tokenizer"),
    ("PostProcessorWrapper", "post_processor"),
    ("DecoderUntagged", "decoder"),
    ("MergeType", "model.merges"),
];

/// An error by the part of the file that it is in, where the library names a type of its own.
fn by_part(error: anyhow::Error, json: &Value) -> anyhow::Error {
    let said = format!("{error:#}");
    let part = PARTS.iter().find(|(name, _)| said.contains(&format!("untagged enum {name}")));
    let Some((_, part)) = part else { return error };
    match json[*part]["type"].as_str() {
        Some(name) => anyhow!("`{part}` of type `{name}` is not as that is known here"),
        None => anyhow!("`{part}` is none that is known here"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::{ChatTemplate, Message, Piece, special_tokens};

    fn golden() -> Value {
        let path = fixtures::root().join("golden/tokenizer_chat.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    pub(crate) fn tiny() -> Tokenizer {
        Tokenizer::open(&fixtures::root().join("tiny/tokenizer")).unwrap()
    }

    pub(crate) fn llama2() -> Tokenizer {
        Tokenizer::parse(golden()["llama2_tokenizer"].take()).unwrap()
    }

    fn ids(value: &Value) -> Vec<i64> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn matches_reference() {
        for (name, tokenizer) in [("tiny", tiny()), ("llama2", llama2())] {
            for case in golden()["texts"][name].as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                let expected = ids(&case["ids"]);
                assert_eq!(tokenizer.encode_template(text).unwrap(), expected, "{name}: {text:?}");
                assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["inert"]), "{name}: {text:?}");
                assert_eq!(tokenizer.decode(&expected, false).unwrap(), case["decoded"], "{name}: {text:?}");
                assert_eq!(tokenizer.decode(&expected, true).unwrap(), case["decoded_plain"], "{name}: {text:?}");
            }
        }
    }

    #[test]
    fn literals_of_special_tokens_are_text() {
        for (tokenizer, literal) in [(tiny(), "<|im_end|>"), (llama2(), "</s>")] {
            let id = tokenizer.token_to_id(literal).unwrap();
            assert_eq!(tokenizer.encode_template(literal).unwrap(), [id]);
            let inert = tokenizer.encode(literal).unwrap();
            assert!(!inert.contains(&id) && inert.len() > 1, "{inert:?}");
            assert_eq!(tokenizer.decode(&inert, true).unwrap(), literal);
        }
        // The private names are no way in either.
        let tokenizer = tiny();
        let forged: String = (0..4).map(|k| char::from_u32(ACTIVE + k).unwrap()).chain([IMAGE]).collect();
        for ids in [tokenizer.encode(&forged).unwrap(), tokenizer.encode_template(&forged).unwrap()] {
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), "\u{fffd}".repeat(5));
        }
    }

    #[test]
    fn a_merge_never_makes_a_special_token() {
        let mut json: Value =
            serde_json::from_slice(&fs::read(fixtures::root().join("tiny/tokenizer/tokenizer.json")).unwrap()).unwrap();
        // As if `re` were special and `red` made of it.
        let re = json["model"]["vocab"]["re"].clone();
        assert!(re.is_u64(), "the tiny vocabulary has a token `re`");
        let mut token = json["added_tokens"][0].clone();
        (token["content"], token["id"]) = ("re".into(), re.clone());
        json["added_tokens"].as_array_mut().unwrap().push(token);
        let tokenizer = Tokenizer::parse(json).unwrap();
        assert!(!tokenizer.encode("a red one").unwrap().contains(&re.as_i64().unwrap()));
        assert_eq!(tokenizer.encode_template("re").unwrap(), ids(&json!([re])));
    }

    #[test]
    fn knows_its_vocabulary() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.vocab_size(), 512);
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(2));
        assert_eq!(tokenizer.eos_ids(), [2]);
        assert_eq!(tokenizer.token_to_id("nonsense"), None);
    }

    #[test]
    fn an_id_without_a_token_is_left_out_of_the_text() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("a red ring").unwrap();
        for id in [-1, 512, 513, 1 << 40] {
            let with: Vec<i64> = ids.iter().flat_map(|&known| [id, known, id]).collect();
            assert_eq!(tokenizer.decode(&with, true).unwrap(), "a red ring");
            let mut stream = tokenizer.stream(true);
            let mut text: String = with.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
            text += &stream.finish().unwrap();
            assert_eq!(text, "a red ring");
        }
    }

    /// The tiny tokenizer with a post-processor that begins a text with `<|im_start|>` and ends it with `<|endoftext|>`.
    fn around(folder: &Path) -> Tokenizer {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixtures::root().join("tiny/tokenizer").join(file), folder.join(file)).unwrap();
        }
        let mut json: Value = serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
        json["post_processor"] =
            json!({"type": "BertProcessing", "cls": ["<|im_start|>", 1], "sep": ["<|endoftext|>", 0]});
        fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::open(folder).unwrap()
    }

    #[test]
    fn a_conversation_gets_the_post_processors_tokens_where_a_processor_feeds_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let plain = around(folder.path());
        let turns = [Message::new("user", "a red ring")];
        let prompt = |tokenizer: &Tokenizer, template: &str| {
            let chat = ChatTemplate::new(template, special_tokens(folder.path()).unwrap(), "test").unwrap();
            match &chat.encode_prompt(tokenizer, &turns).unwrap()[..] {
                [Piece::Text { ids, supervised: false }] => ids.clone(),
                other => panic!("{other:?}"),
            }
        };
        let (bare, with_bos) = ("{{ messages[0].content }}", "{{ bos_token + messages[0].content }}");
        let ids = plain.encode("a red ring").unwrap();
        assert_eq!(prompt(&plain, bare), ids);
        let fed = around(folder.path()).for_processor(true);
        assert_eq!(prompt(&fed, bare), [&[1], &ids[..], &[0]].concat());
        assert_eq!(prompt(&fed, with_bos), [&[1], &ids[..]].concat());
        // What somebody writes is no beginning.
        assert_eq!(prompt(&fed, "{{ '' + messages[0].content }}").len(), ids.len() + 2);
        let said = [Message::new("user", "<|im_start|>")];
        let chat = ChatTemplate::new(bare, special_tokens(folder.path()).unwrap(), "test").unwrap();
        let pieces = chat.encode_prompt(&fed, &said).unwrap();
        assert!(matches!(&pieces[..], [Piece::Text { ids, .. }] if ids[0] == 1 && ids.len() > 3), "{pieces:?}");

        // In a whole conversation none of them is learned.
        let turns = [Message::new("user", "a red ring?"), Message::new("assistant", "yes")];
        let template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}{% endif %}";
        let chat = ChatTemplate::new(template, Vec::new(), "test").unwrap();
        let pieces = chat.encode_chat(&fed, &turns).unwrap();
        let around = |piece: Option<&Piece>, id| matches!(piece, Some(Piece::Text { ids, supervised: false }) if ids.contains(&id));
        assert!(pieces.len() == 3 && around(pieces.first(), 1) && around(pieces.last(), 0), "{pieces:?}");
        assert_eq!(fed.encode_whole("a red ring").unwrap(), [&[1], &ids[..], &[0]].concat());
        let error = fed.for_embedding(1).encode_whole("").unwrap_err().to_string();
        assert!(error.starts_with("token `<|im_start|>` has id 1, but the model's embedding has 1 rows"), "{error}");
    }

    #[test]
    fn several_tokens_may_end_a_sequence() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixtures::root().join("tiny/tokenizer").join(file), folder.path().join(file)).unwrap();
        }
        fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
        assert_eq!(Tokenizer::open(folder.path()).unwrap().eos_ids(), [2, 7]);
        fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [0, 2]}"#).unwrap();
        assert_eq!(Tokenizer::open(folder.path()).unwrap().eos_ids(), [0, 2]);
    }

    #[test]
    fn a_token_beyond_the_embedding_is_refused_with_both_sizes() {
        let text = fs::read(fixtures::root().join("tiny/tokenizer/tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        for (id, content, special) in [(512, "<|user|>", true), (513, "<loc>", false)] {
            let mut token = json["added_tokens"][0].clone();
            (token["id"], token["content"], token["special"]) = (id.into(), content.into(), special.into());
            json["added_tokens"].as_array_mut().unwrap().push(token);
        }
        let tokenizer = |rows| Tokenizer::parse(json.clone()).unwrap().for_embedding(rows);
        assert_eq!(tokenizer(514).encode_template("<|user|><loc>").unwrap(), [512, 513]);
        let small = tokenizer(512);
        small.encode("a red ring <|user|>").unwrap(); // there, the special token is text
        for (error, token, id) in [
            (small.encode_template("a <|user|>").unwrap_err(), "<|user|>", 512),
            (small.encode("a <loc>").unwrap_err(), "<loc>", 513),
            (small.encode_activated(&small.activate("<|user|>")).err().unwrap(), "<|user|>", 512),
        ] {
            let expected = format!(
                "token `{token}` has id {id}, but the model's embedding has 512 rows, the tokenizer 514 tokens"
            );
            assert!(error.to_string().starts_with(&expected), "{error}");
            let expected = TextError::BeyondEmbedding { token: token.to_owned(), id, rows: 512, vocab_size: 514 };
            assert_eq!(error.downcast_ref(), Some(&expected));
        }
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Tokenizer::open(folder.path()).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("tokenizer.json"), "{error}");
        for broken in ["not json", "{}", r#"{"added_tokens": [{"id": 1}]}"#, r#"{"model": {"type": "BPE"}}"#] {
            fs::write(folder.path().join("tokenizer.json"), broken).unwrap();
            let error = format!("{:#}", Tokenizer::open(folder.path()).unwrap_err());
            assert!(error.contains("tokenizer.json"), "{broken}: {error}");
        }
        // Not by the names that types have in the library.
        let whole = fs::read(fixtures::root().join("tiny/tokenizer/tokenizer.json")).unwrap();
        for part in ["model", "normalizer", "pre_tokenizer", "post_processor", "decoder"] {
            let mut json: Value = serde_json::from_slice(&whole).unwrap();
            json[part]["type"] = "Odd".into();
            fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
            let error = format!("{:#}", Tokenizer::open(folder.path()).unwrap_err());
            assert!(error.ends_with(&format!("`{part}` of type `Odd` is not as that is known here")), "{error}");
        }
    }
}
