//! Integration tests of ps-actors; one binary, one module per subject.

mod actor;
