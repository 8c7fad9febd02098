//! The token: a process that knows it may connect.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use subtle::ConstantTimeEq;

/// A secret that all processes of a run share. `Debug` does not show it.
///
/// ```
/// use ps_runtime::cluster::ClusterConfig;
/// use ps_runtime::net::Token;
///
/// // `Cluster::launch` reads it from PS_TOKEN if the configuration has none.
/// let token = Token::random();
/// let config = ClusterConfig { token: Some(token), ..ClusterConfig::default() };
/// # drop(config);
/// assert!(Token::new("too short").is_err());
/// ```
#[derive(Clone)]
pub struct Token(Arc<str>);

/// Why a text cannot be a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The text has too few characters, so it could be guessed.
    #[error("a token must have at least {MIN_LEN} characters, not {0}")]
    TooShort(usize),
    /// The text cannot be sent in an HTTP header.
    #[error("a token may only have visible ASCII characters")]
    Characters,
    /// The file of the token cannot be read.
    #[error("could not read the token from {path}")]
    File {
        /// The path of the file.
        path: String,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
}

const MIN_LEN: usize = 16;

impl Token {
    /// Makes a token from at least 16 visible ASCII characters.
    ///
    /// # Errors
    /// When the text is too short or has other characters.
    pub fn new(text: impl AsRef<str>) -> Result<Self, TokenError> {
        let text = text.as_ref();
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Characters);
        }
        match text.len() {
            MIN_LEN.. => Ok(Self(text.into())),
            len => Err(TokenError::TooShort(len)),
        }
    }

    /// Reads a token from a file. White space around it is ignored.
    ///
    /// # Errors
    /// When the file cannot be read, or when its text cannot be a token.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path).map_err(|source| TokenError::File {
            path: path.display().to_string(),
            source,
        })?;
        Self::new(text.trim())
    }

    /// Makes a random token.
    ///
    /// # Panics
    /// When the system gives no random numbers.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system gives random numbers");
        Self(bytes.map(|byte| format!("{byte:02x}")).concat().into())
    }

    /// Returns the text of the token, to pass it to another process. Do not log it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares in a time that does not depend on the place where the two differ.
    pub(crate) fn matches(&self, other: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(other).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Whether an HTTP request may pass: no token is needed, or the request has the right one.
pub(crate) fn may_pass(token: Option<&Token>, authorization: Option<&[u8]>) -> bool {
    match (token, authorization) {
        (None, _) => true,
        (Some(token), Some(given)) => given
            .strip_prefix(b"Bearer ")
            .is_some_and(|given| token.matches(given)),
        (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::new("correct-horse-battery").unwrap();
        assert!(!format!("{token:?}").contains("horse"));
        assert_ne!(Token::random().reveal(), Token::random().reveal());
    }

    #[test]
    fn what_is_no_token_is_refused() {
        assert!(matches!(Token::new("short"), Err(TokenError::TooShort(5))));
        assert!(matches!(
            Token::new("sixteen characters\n"),
            Err(TokenError::Characters)
        ));
    }

    #[test]
    fn only_the_token_itself_passes() {
        let token = Token::new("correct-horse-battery").unwrap();
        let passes = |given| may_pass(Some(&token), given);
        assert!(passes(Some(b"Bearer correct-horse-battery")));
        for given in [
            &b"Bearer correct-horse-batterz"[..],
            b"Bearer ",
            b"correct-horse-battery",
            b"",
        ] {
            assert!(!passes(Some(given)));
        }
        assert!(!passes(None));
        assert!(may_pass(None, None));
    }
}
