//! `/v1/models`: the names that a model answers to.

use serde_json::{Value, json};

use crate::state::{Loaded, State};

/// All of them.
pub(crate) fn list(state: &State, loaded: &Loaded) -> Value {
    let data: Vec<Value> = loaded.names(&state.config.name).iter().map(|name| one(state, loaded, name)).collect();
    json!({"object": "list", "data": data})
}

/// One of them, where there is one of this name.
pub(crate) fn named(state: &State, loaded: &Loaded, name: &str) -> Option<Value> {
    loaded.names(&state.config.name).contains(&name.to_owned()).then(|| one(state, loaded, name))
}

fn one(state: &State, loaded: &Loaded, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "vora",
        "max_model_len": loaded.context,
        "sees": loaded.sees,
    })
}
