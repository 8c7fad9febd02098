//! ps-model.
