//! The chat page: one file, which fetches nothing but this server's answers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The page.
pub(crate) const HTML: &str = include_str!("page.html");

/// What a browser may do with the page, as a header: run the script and take the styles that stand in it, by their digests,
/// ask this server, show pictures that it was given, and nothing else.
pub(crate) fn policy() -> String {
    let digest = |tag: &str| {
        let inside = HTML.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
        STANDARD.encode(Sha256::digest(inside.map_or("", |(inside, _)| inside)))
    };
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src blob: data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
        digest("script"),
        digest("style"),
    )
}
