//! The chat page: one file, which fetches nothing but this server's answers.

/// The page.
pub(crate) const HTML: &str = include_str!("page.html");

/// What a browser may do with it. Styles and scripts are those that stand in it, which is all there is of them: text of
/// models and users never becomes markup.
pub(crate) const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
     img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
