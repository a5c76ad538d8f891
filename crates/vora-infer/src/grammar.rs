//! Answers of a given form: of what may come next, only the tokens that a grammar allows.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};
use vora_text::Tokenizer;

use crate::ResponseFormat;
use crate::error::InferError;

/// Between two tokens of JSON: no more than this, or a model that is unsure writes spaces until it is stopped.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{0,20}";

/// The tokens of one tokenizer, by which grammars are compiled.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

/// A grammar, and how far an answer has come in it.
pub(crate) struct Grammar(Box<Matcher>);

impl Grammars {
    /// # Errors
    /// [`InferError::BadSchema`] where the tokenizer has no token that ends a sequence.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let eos = tokenizer.eos_ids().iter().filter_map(|&id| u32::try_from(id).ok()).collect::<Vec<_>>();
        let first = *eos
            .first()
            .ok_or_else(|| bad("an answer of a given form needs a token that ends it, and the tokenizer names none"))?;
        let special =
            |id: i64, bytes: Vec<u8>| if tokenizer.is_special_id(id) { [vec![0xff], bytes].concat() } else { bytes };
        let tokens: Vec<Vec<u8>> =
            (0..tokenizer.vocab_size()).map(|id| special(id, tokenizer.token_bytes(id))).collect();
        let info = TokRxInfo::new(u32::try_from(tokens.len())?, first);
        let trie = TokTrie::from(&info, &tokens).with_eos_tokens(&eos);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env)?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// The grammar of a form; none where anything may come.
    ///
    /// # Errors
    /// [`InferError::BadSchema`].
    pub(crate) fn start(&self, format: &ResponseFormat) -> Result<Option<Grammar>> {
        let mut schema = match format {
            ResponseFormat::Text => return Ok(None),
            ResponseFormat::JsonObject => json!({"type": "object"}),
            ResponseFormat::JsonSchema(schema) => schema.clone(),
        };
        if let Value::Object(_) = schema {
            let options = JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.to_owned()), ..Default::default() };
            options.apply_to(&mut schema);
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(problem) => Err(bad(problem).into()),
            None => Ok(Some(Grammar(Box::new(matcher)))),
        }
    }
}

impl Grammar {
    /// Leaves out the logits of what may not come next; those of the tokens that end an answer where it may end.
    ///
    /// # Errors
    /// [`InferError::BadSchema`] where the grammar is too large to go on with.
    pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.0.compute_mask_or_eos().map_err(bad)?;
        let known = allowed.len();
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= known || !allowed.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on by the token that was chosen.
    ///
    /// # Errors
    /// Where it is none of those that may come.
    pub(crate) fn took(&mut self, token: i64) -> Result<()> {
        Ok(self.0.consume_token(u32::try_from(token)?).map_err(bad)?)
    }
}

/// What cannot be kept of a form.
fn bad(problem: impl fmt::Display) -> InferError {
    InferError::BadSchema { problem: problem.to_string() }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sampler, SamplingParams};

    fn tokenizer() -> Tokenizer {
        Tokenizer::open(&fixtures::root().join("tiny/llm")).unwrap()
    }

    /// An answer of random logits, which are JSON of the form all the same.
    fn write(tokenizer: &Tokenizer, format: &ResponseFormat, seed: u64) -> Option<String> {
        let mut grammar = Grammars::new(tokenizer).unwrap().start(format).unwrap().unwrap();
        let mut sampler = Sampler::new(SamplingParams::default().with_temperature(1.0).with_seed(seed), &[]).unwrap();
        let mut ids = Vec::new();
        for step in 0..200 {
            let random = fixtures::Random::new(seed * 1000 + step);
            // More rows than tokens, as models have.
            let mut logits = Vec::<f32>::try_from(random.normal([tokenizer.vocab_size() + 8])).unwrap();
            grammar.mask(&mut logits).unwrap();
            let token = sampler.choose(&mut logits);
            if tokenizer.eos_ids().contains(&token) {
                return Some(tokenizer.decode(&ids, false).unwrap());
            }
            grammar.took(token).unwrap();
            ids.push(token);
        }
        None
    }

    #[test]
    fn whatever_the_logits_an_answer_is_of_the_form() {
        let tokenizer = tokenizer();
        let schema = json!({
            "type": "object",
            "properties": {
                "colour": {"enum": ["red", "green"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 20},
                "round": {"type": "boolean"},
            },
            "required": ["colour", "count"],
            "additionalProperties": false,
        });
        let mut ended = 0;
        for seed in 0..20 {
            let Some(text) = write(&tokenizer, &ResponseFormat::JsonSchema(schema.clone()), seed) else { continue };
            ended += 1;
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            let object = value.as_object().unwrap();
            assert!(["red", "green"].contains(&object["colour"].as_str().unwrap()), "{text}");
            assert!(object["count"].as_u64().unwrap() <= 20, "{text}");
            assert!(object.keys().all(|key| ["colour", "count", "round"].contains(&key.as_str())), "{text}");
        }
        assert!(ended > 10, "{ended} of 20 came to an end");
        let objects = (0..20).filter_map(|seed| write(&tokenizer, &ResponseFormat::JsonObject, seed));
        let objects: Vec<String> = objects.collect();
        assert!(
            !objects.is_empty() && objects.iter().all(|text| serde_json::from_str::<Value>(text).unwrap().is_object())
        );
    }

    #[test]
    fn a_schema_that_cannot_be_kept_is_refused() {
        let grammars = Grammars::new(&tokenizer()).unwrap();
        for schema in [json!({"type": "colour"}), json!({"$ref": "#/nowhere"}), json!(7)] {
            let error = grammars.start(&ResponseFormat::JsonSchema(schema.clone())).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(InferError::BadSchema { .. })), "{schema}: {error}");
        }
        assert!(grammars.start(&ResponseFormat::Text).unwrap().is_none());
    }
}
