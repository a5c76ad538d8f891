//! A request's body as it comes: known fields typed, unknown ones passed over without being kept.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

use crate::error::ApiError;

/// Messages, and parts of a message.
const MAX_PARTS: usize = 4096;
/// Values in a JSON schema.
const MAX_SCHEMA: usize = 10_000;

/// The fields of a request that something is done with.
#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct Wire {
    pub(super) model: Option<String>,
    pub(super) messages: Few<WireMessage>,
    pub(super) n: Option<Whole>,
    pub(super) seed: Option<Whole>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<Whole>,
    pub(super) min_p: Option<f64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) max_tokens: Option<Whole>,
    pub(super) max_completion_tokens: Option<Whole>,
    pub(super) stop: Option<OneOrMore<String>>,
    pub(super) logit_bias: Option<FewNamed>,
    pub(super) logprobs: Option<bool>,
    pub(super) top_logprobs: Option<Whole>,
    pub(super) response_format: Option<WireFormat>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) tools: Option<Few<serde::de::IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct WireMessage {
    pub(super) role: String,
    pub(super) content: Option<OneOrMore<WirePart>>,
}

/// A part of a message; a plain string is one of type `text`.
#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct WirePart {
    pub(super) r#type: String,
    pub(super) text: Option<String>,
    pub(super) image_url: Option<ImageUrl>,
}

#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct ImageUrl {
    pub(super) url: String,
}

#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct WireFormat {
    pub(super) r#type: String,
    pub(super) json_schema: Option<WireSchema>,
}

#[derive(Debug, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct WireSchema {
    pub(super) schema: Option<SmallJson>,
}

/// The structs above are read of objects alone; by itself serde takes a list for one, too, by the order of its fields.
macro_rules! objects {
    ($($name:ident: $what:literal,)*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Object;

                impl<'de> Visitor<'de> for Object {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }

                    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<$name, A::Error> {
                        $name::deserialize(MapAccessDeserializer::new(map))
                    }
                }

                from.deserialize_map(Object)
            }
        }
    )*};
}

objects! {
    Wire: "an object with `messages`",
    WireMessage: "an object with `role` and `content`",
    WirePart: "an object with `type`",
    ImageUrl: "an object with `url`",
    StreamOptions: "an object",
    WireFormat: "an object with `type`",
    WireSchema: "an object with `schema`",
}

/// A whole number, which JSON may also write as `2.0`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole(pub(super) i64);

/// A list that is refused before it grows long.
#[derive(Debug)]
pub(super) struct Few<T>(pub(super) Vec<T>);

/// A string, or a list.
#[derive(Debug)]
pub(super) enum OneOrMore<T> {
    One(String),
    More(Vec<T>),
}

/// Numbers by name, not many.
#[derive(Debug)]
pub(super) struct FewNamed(pub(super) BTreeMap<String, f64>);

/// JSON of not many values.
#[derive(Debug)]
pub(super) struct SmallJson(pub(super) Value);

impl Wire {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong, and at which field.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut json = serde_json::Deserializer::from_slice(body);
        let wire = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            explain(&path, error.inner())
        })?;
        json.end().map_err(|error| explain(".", &error))?;
        Ok(wire)
    }
}

/// An error of serde's, without the strings of the request that it quotes.
fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let mut message = error.to_string();
    if let (Some(from), Some(to)) = (message.find("string \""), message.rfind("\", expected")) {
        message.replace_range(from..=to, "a string");
    }
    message = message.replace("expected f64", "expected a number");
    if error.is_syntax() || error.is_eof() {
        return ApiError::refused(hyper::StatusCode::BAD_REQUEST, format!("the body is not JSON: {message}"));
    }
    if path != "." {
        message.truncate(message.rfind(" at line ").unwrap_or(message.len()));
    }
    let named = |start: &str| Some(message.strip_prefix(start)?.split('`').next()?.to_owned());
    let field = named("missing field `").or_else(|| named("duplicate field `"));
    match (path, field) {
        ("." | "?", Some(field)) => ApiError::invalid(field, message),
        ("." | "?", None) => {
            ApiError::refused(hyper::StatusCode::BAD_REQUEST, format!("the body is not a request: {message}"))
        }
        (path, _) => ApiError::invalid(path, format!("{path}: {message}")),
    }
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(WholeNumber)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(List(PhantomData)).map(Self)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMore<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StringOrList(PhantomData))
    }
}

impl<'de> Deserialize<'de> for FewNamed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Named)
    }
}

impl<'de> Deserialize<'de> for SmallJson {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Counted(&mut 0).deserialize(from).map(Self)
    }
}

struct WholeNumber;

impl Visitor<'_> for WholeNumber {
    type Value = Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
        Ok(Whole(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
        i64::try_from(value).map(Whole).map_err(|_| E::custom(format!("{value} is too large")))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
        if value.fract() == 0.0 && value.abs() < 9e15 {
            return Ok(Whole(value as i64));
        }
        Err(E::custom(format!("{value} is no whole number that can be meant")))
    }
}

struct List<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
            if items.len() > MAX_PARTS {
                return Err(A::Error::custom(format!("there are more than {MAX_PARTS}")));
            }
        }
        Ok(items)
    }
}

struct StringOrList<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for StringOrList<T> {
    type Value = OneOrMore<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string or a list")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMore<T>, E> {
        Ok(OneOrMore::One(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<OneOrMore<T>, E> {
        Ok(OneOrMore::One(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMore<T>, A::Error> {
        List(PhantomData).visit_seq(seq).map(OneOrMore::More)
    }
}

struct Named;

impl<'de> Visitor<'de> for Named {
    type Value = FewNamed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FewNamed, A::Error> {
        let mut named = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<String, f64>()? {
            named.insert(name, value);
            if named.len() > MAX_PARTS {
                return Err(A::Error::custom(format!("there are more than {MAX_PARTS}")));
            }
        }
        Ok(FewNamed(named))
    }
}

/// Reads JSON and counts its values.
struct Counted<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        *self.0 += 1;
        if *self.0 > MAX_SCHEMA {
            return Err(D::Error::custom(format!("it has more than {MAX_SCHEMA} values")));
        }
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Counted(&mut *self.0))? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key()? {
            object.insert(key, map.next_value_seed(Counted(&mut *self.0))?);
        }
        Ok(object.into())
    }
}
