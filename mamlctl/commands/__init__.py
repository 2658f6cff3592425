"""The commands as functions: settings in, result out; nothing printed."""
