//! JSON objects read key by key.

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An object. serde tells what is wrong with a value, but not whose it is: this does, of a key that is missing too.
///
/// # Errors
/// Names the key.
pub fn object<T: DeserializeOwned>(json: &Value) -> Result<T> {
    let whole = T::deserialize(json);
    if whole.is_err() {
        for (key, value) in json.as_object().into_iter().flatten() {
            let alone = T::deserialize(Value::Object([(key.clone(), value.clone())].into_iter().collect()));
            // Without the others that is no fault of its own.
            if !alone.as_ref().is_err_and(|error| error.to_string().starts_with("missing field")) {
                alone.with_context(|| format!("`{key}`"))?;
            }
        }
    }
    Ok(whole?)
}
