//! JSON objects read key by key.

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An object all of whose keys may be missing. serde tells what is wrong with a value, but not whose it is: this does.
///
/// # Errors
/// Names the key.
pub fn object<T: DeserializeOwned>(json: &Value) -> Result<T> {
    let whole = T::deserialize(json);
    if whole.is_err() {
        for (key, value) in json.as_object().into_iter().flatten() {
            T::deserialize(Value::Object([(key.clone(), value.clone())].into_iter().collect()))
                .with_context(|| format!("`{key}`"))?;
        }
    }
    Ok(whole?)
}
