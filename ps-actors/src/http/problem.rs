//! What a client gets instead of the answer that it asked for.

use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use ps_runtime::actor::error_chain;
use ps_runtime::actor::{CallError, NotDelivered};

use super::headers::{JOIN_AGAIN, VERSION};
use crate::ids::Version;
use crate::server::{GroupError, Refusal, ServerError, ShardError};

/// A status code, a sentence for people, and what a program needs to go on.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    status: StatusCode,
    text: String,
    must_join_again: bool,
    version: Option<Version>,
    may_retry_soon: bool,
}

impl Problem {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
            must_join_again: false,
            version: None,
            may_retry_soon: false,
        }
    }

    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    pub(super) fn unavailable(text: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text)
    }

    pub(super) fn retry_soon(mut self) -> Self {
        self.may_retry_soon = true;
        self
    }

    fn join_again(mut self) -> Self {
        self.must_join_again = true;
        self
    }

    fn version(mut self, version: Version) -> Self {
        self.version = Some(version);
        self
    }
}

impl From<&GroupError> for Problem {
    fn from(error: &GroupError) -> Self {
        let text = error_chain(error);
        match error {
            GroupError::Call { source, .. } => {
                let problem = Self::unavailable(text);
                match source {
                    CallError::NotDelivered {
                        reason: NotDelivered::QueueFull { .. },
                        ..
                    } => problem.retry_soon(),
                    _ => problem,
                }
            }
            GroupError::Server { source, .. } => Self::from_server(source, text),
            GroupError::BadWeights { .. } => Self::unavailable(text),
        }
    }
}

impl From<GroupError> for Problem {
    fn from(error: GroupError) -> Self {
        Self::from(&error)
    }
}

impl Problem {
    fn from_server(error: &ServerError, text: String) -> Self {
        match error {
            ServerError::Refused(refusal) => Self::from_refusal(refusal, text),
            ServerError::Shard(shard) => match shard {
                ShardError::WrongRange { .. } | ShardError::WrongBuffers { .. } => {
                    Self::new(StatusCode::UNPROCESSABLE_ENTITY, text)
                }
                ShardError::Fenced { .. } => Self::new(StatusCode::CONFLICT, text).join_again(),
                ShardError::TooManyStaged { .. } | ShardError::TooManyStrangers { .. } => {
                    Self::new(StatusCode::TOO_MANY_REQUESTS, text).retry_soon()
                }
                ShardError::VersionGone { oldest, .. } => {
                    Self::new(StatusCode::GONE, text).version(*oldest)
                }
                // Only servers of the group get this error.
                ShardError::WrongUpdate { .. } | ShardError::BadUpdate { .. } => {
                    Self::unavailable(text)
                }
            },
            ServerError::BadNorm { .. } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, text),
            ServerError::FollowerBehind { .. } | ServerError::TooManyWaiting { .. } => {
                Self::unavailable(text).retry_soon()
            }
            ServerError::NotFirst
            | ServerError::Config(_)
            | ServerError::GroupBroken { .. }
            | ServerError::NotFetched { .. }
            | ServerError::NotFollowed { .. }
            | ServerError::Stopping => Self::unavailable(text),
        }
    }

    fn from_refusal(refusal: &Refusal, text: String) -> Self {
        let conflict = Self::new(StatusCode::CONFLICT, text.clone());
        match refusal {
            Refusal::NotMember { .. } | Refusal::Silent { .. } | Refusal::Fenced { .. } => {
                conflict.join_again()
            }
            Refusal::FromTheFuture { version, .. } => conflict.version(*version),
            Refusal::TooManyExamples { .. } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, text),
            Refusal::TooManyPending { .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, text).retry_soon()
            }
            Refusal::Forgotten { .. }
            | Refusal::IncarnationAhead { .. }
            | Refusal::ClockAhead { .. }
            | Refusal::TwoIncarnations { .. }
            | Refusal::AlreadyPushed { .. }
            | Refusal::TooManyWorkers { .. }
            | Refusal::Empty => conflict,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.text + "\n").into_response();
        let headers = response.headers_mut();
        let text = const { axum::http::HeaderValue::from_static("text/plain; charset=utf-8") };
        headers.insert(CONTENT_TYPE, text);
        if self.must_join_again {
            headers.insert(JOIN_AGAIN, 1u64.into());
        }
        if let Some(version) = self.version {
            headers.insert(VERSION, version.0.into());
        }
        if self.may_retry_soon {
            headers.insert(RETRY_AFTER, 1u64.into());
        }
        response
    }
}
